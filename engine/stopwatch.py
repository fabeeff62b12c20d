"""Time on a device: wall time of a CPU, events in the stream of a GPU, which other processes' Python cannot stretch."""

import time
from types import TracebackType

import torch


class Stopwatch:
    """`with Stopwatch(device) as watch: ...`, then `watch.ns`: nanoseconds that the device needed for the block."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ns = 0

    def __enter__(self) -> "Stopwatch":
        synchronise(self.device)
        if self.device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        else:
            self._begin = time.perf_counter_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":  # not run on a GPU yet
            self._events[1].record()
            synchronise(self.device)
            self.ns = round(self._events[0].elapsed_time(self._events[1]) * 1e6)
        else:
            self.ns = time.perf_counter_ns() - self._begin


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
