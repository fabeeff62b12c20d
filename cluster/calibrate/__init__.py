"""Thresholds that keep a promise: what is tested, on which groups, and the file that carries policy and evidence."""
