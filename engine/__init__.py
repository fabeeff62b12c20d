"""The engine: dynamic inference of a decoder-only language model. Knows torch; knows no SQL, no Ray, no HTTP."""

from engine import waiting

__all__ = ["waiting"]
