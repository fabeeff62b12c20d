"""Replay: any number of policies applied to a trace, in numpy. No torch here: the model is not touched."""
