"""Datasets of the library `datasets`: saved to a folder, Parquet files, or on the hub. Their rows are mapped, not read;
code that comes with one is never run.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from engine.errors import BadInput, UnknownName
from engine.registry import unknown
from workers.benchmarks.records import Record, samples_of
from workers.benchmarks.sample import Sample
from workers.benchmarks.spec import DatasetBenchmark

HINT = "give a folder that save_to_disk wrote, Parquet files, or a hub id where there is a network."


def dataset_samples(spec: DatasetBenchmark) -> tuple[list[Sample], list[str]]:
    """A sample a row. Raises `BadInput` with the row's number, or where the dataset cannot be had."""
    where = f"dataset {spec.dataset!r}, split {spec.split!r}"
    rows = open_dataset(spec.dataset, spec.config, spec.split, streaming=spec.streaming)
    if not hasattr(rows, "select"):  # a stream
        return samples_of(spec, (Record(where, "row", number, row) for number, row in enumerate(rows, start=1)))
    return samples_of(spec, Rows(where, rows))


class Rows:
    """The rows of a split by their places."""

    def __init__(self, where: str, rows: Any) -> None:
        self._where, self._rows = where, rows

    def __len__(self) -> int:
        return len(self._rows)

    def number(self, place: int) -> int:
        """From 1 on."""
        return place + 1

    def at(self, places: Iterable[int]) -> Iterator[Record]:
        """The rows at some places, counted from 0; those that follow each other are read together."""
        if isinstance(places, range):
            for place, row in zip(places, self._rows.select(places), strict=True):
                yield Record(self._where, "row", self.number(place), row)
        else:
            for place in places:
                yield Record(self._where, "row", self.number(place), self._rows[place])


def open_dataset(name: str, config: str | None, split: str, *, streaming: bool = False, hint: str = HINT) -> Any:
    """The rows of one split. streaming: read over the network while they are gone through, not fetched before.

    hint: where to get what is not there. Raises `BadInput`.
    """
    import datasets

    path = Path(os.path.expanduser(name))
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        if files := _parquet_files(path):
            return datasets.load_dataset("parquet", data_files=files, split="train")
        if path.is_dir():
            return _split(name, split, datasets.load_from_disk(str(path)))
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except BadInput:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise BadInput(f"dataset {name!r} cannot be had ({type(error).__name__}: {reason}); {hint}") from None
    finally:
        if not bars:
            datasets.enable_progress_bars()


def _parquet_files(path: Path) -> list[str]:
    """A file by itself, or all of a folder, in the order of their names."""
    if path.suffix == ".parquet" and path.is_file():
        return [str(path)]
    return sorted(map(str, path.glob("*.parquet"))) if path.is_dir() else []


def _split(name: str, split: str, found: Any) -> Any:
    """The split of a saved dataset; a folder may hold one dataset alone."""
    if not isinstance(found, dict):
        return found
    if split not in found:
        raise UnknownName(f"dataset {name!r}: {unknown('split', split, list(found))}")
    return found[split]
