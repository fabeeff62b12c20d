"""Waiting for what another process or thread does: a condition with a deadline, never a sleep."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: patient with a slow machine
DEADLINE_SECONDS = 240.0


def wait_for(what: str, look: Callable[[], T | None], seconds: float = DEADLINE_SECONDS) -> T:
    """The first true answer; fails after the deadline."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = look()
        if answer:
            return answer
        time.sleep(0.02)
    raise AssertionError(f"not seen within {seconds:.0f} s: {what}")
