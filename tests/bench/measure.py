"""Ratios that hold on a shared machine: interleaved pairs, their median, and a bootstrap interval of it."""

import json
import platform
import time
from collections.abc import Callable, Iterable
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
    """The median with its bootstrap interval."""
    spread = bootstrap((np.array(values),), np.median, method="percentile", rng=0).confidence_interval
    return Row(name, float(np.median(values)), float(spread.low), float(spread.high), unit, at_least, at_most)


def printed(rows: Iterable[Row]) -> list[Row]:
    """The rows, each printed as soon as it is there."""
    kept = []
    for row in rows:
        wanted = "" if row.at_least is None else f"   at least {row.at_least:g}"
        wanted += "" if row.at_most is None else f"   at most {row.at_most:g}"
        print(f"{row.name:<58} {row.value:8.3f} {row.unit:<6} [{row.low:.3f}, {row.high:.3f}]{wanted}", flush=True)
        kept.append(row)
    return kept


def write(name: str, rows: list[Row], folder: Path = Path("build/bench")) -> None:
    """Keep the table as JSON with the machine and the versions."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": {"processor": platform.processor(), "system": platform.platform()},
        "versions": {package: version(package) for package in PACKAGES},
        "rows": [{key: value for key, value in asdict(row).items() if value is not None} for row in rows],
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")
