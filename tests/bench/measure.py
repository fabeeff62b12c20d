"""Ratios that hold on a shared machine: interleaved pairs, their median, and a bootstrap interval of it."""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap

PACKAGES = ("torch", "transformers", "ray", "sqlalchemy", "numpy")


@dataclass(frozen=True)
class Row:
    """One figure with its 95 % interval."""

    name: str
    value: float
    low: float
    high: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None


def seconds(act: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def ratio(
    name: str,
    one: Callable[[], object],
    other: Callable[[], object],
    pairs: int = 7,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Row:
    """How many times longer `one` takes than `other`: A B A B …, after a warm-up of both."""
    one(), other()
    ratios = [seconds(one) / seconds(other) for _ in range(pairs)]
    return summarise(name, ratios, "x", at_least, at_most)


def summarise(
    name: str, values: list[float], unit: str, at_least: float | None = None, at_most: float | None = None
) -> Row:
    """The median with its bootstrap interval; of one value none is known."""
    if len(values) < 2:
        return Row(name, values[0], math.nan, math.nan, unit, at_least, at_most)
    spread = bootstrap((np.array(values),), np.median, method="percentile", rng=0).confidence_interval
    return Row(name, float(np.median(values)), float(spread.low), float(spread.high), unit, at_least, at_most)


def printed(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, each printed as soon as it is there."""
    for row in rows:
        wanted = "" if row.at_least is None else f"   at least {row.at_least:g}"
        wanted += "" if row.at_most is None else f"   at most {row.at_most:g}"
        print(f"{row.name:<58} {row.value:8.3f} {row.unit:<6} [{row.low:.3f}, {row.high:.3f}]{wanted}", flush=True)
        yield row


def write(name: str, rows: Iterable[Row], folder: Path = Path("build/bench")) -> None:
    """Keep the table as JSON with the machine and the versions, row by row: who is interrupted has what there was."""
    folder.mkdir(parents=True, exist_ok=True)
    path, kept = folder / f"{name}.json", list[Row]()
    for row in rows:
        kept.append(row)
        _write(path, kept)
    print(f"written to {path}")


def peak_bytes() -> int:
    """Bytes that this process had at most. Not `ru_maxrss`: that begins with what the parent had."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _write(path: Path, rows: list[Row]) -> None:
    from engine.device import processor  # which brings torch: not every bench needs it before its first row

    content = {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {package: version(package) for package in PACKAGES},
        "rows": [{key: _known(value) for key, value in asdict(row).items() if value is not None} for row in rows],
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _known(value: object) -> object:
    """JSON has no nan: an end of an interval that is not known is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
