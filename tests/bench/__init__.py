"""Measurements. The engine comes first: it sets how torch's threads wait, which torch reads when it is loaded."""

import engine

__all__ = ["engine"]
