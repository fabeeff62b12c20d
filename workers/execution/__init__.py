"""Executing completions: only when asked to, and only in a sandbox."""
