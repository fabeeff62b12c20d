"""What a device reaches, measured."""

from collections.abc import Callable
from statistics import median

import torch

from engine.cost import Machine
from engine.stopwatch import Stopwatch


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Read 256 MiB, and multiply two square matrices: median of five each, after a warm-up; about half a second."""
    data = torch.zeros(2**26, device=device)
    square = torch.ones((1536, 1536), device=device, dtype=dtype)
    read = _median_seconds(data.sum, device)
    multiply = _median_seconds(lambda: square @ square, device)
    return Machine(bandwidth=data.nbytes / read, peak=2 * 1536**3 / multiply)


def _median_seconds(act: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(6):
        with Stopwatch(device) as watch:
            act()
        times.append(watch.ns / 1e9)
    return median(times[1:])
