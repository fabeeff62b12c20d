"""Datasets of the library `datasets`: saved to a folder, or on the hub. Code that comes with one is never run."""

import os
from typing import Any

from engine.errors import BadInput, UnknownName
from engine.registry import unknown
from workers.benchmarks.records import Record, samples_of
from workers.benchmarks.sample import Sample
from workers.benchmarks.spec import DatasetBenchmark

HINT = "give a folder that save_to_disk wrote, or a hub id where there is a network."


def dataset_samples(spec: DatasetBenchmark) -> tuple[list[Sample], list[str]]:
    """A sample a row. Raises `BadInput` with the row's number, or where the dataset cannot be had."""
    where = f"dataset {spec.dataset!r}, split {spec.split!r}"
    rows = open_dataset(spec.dataset, spec.config, spec.split)
    return samples_of(spec, (Record(where, "row", i, row) for i, row in enumerate(rows, start=1)))


def open_dataset(name: str, config: str | None, split: str, *, hint: str = HINT) -> Any:
    """The rows of one split. hint: where to get what is not there. Raises `BadInput`."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        if os.path.isdir(os.path.expanduser(name)):
            return _split(name, split, datasets.load_from_disk(os.path.expanduser(name)))
        return datasets.load_dataset(name, config, split=split)
    except BadInput:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise BadInput(f"dataset {name!r} cannot be had ({type(error).__name__}: {reason}); {hint}") from None
    finally:
        if not bars:
            datasets.enable_progress_bars()


def _split(name: str, split: str, found: Any) -> Any:
    """The split of a saved dataset; a folder may hold one dataset alone."""
    if not isinstance(found, dict):
        return found
    if split not in found:
        raise UnknownName(f"dataset {name!r}: {unknown('split', split, list(found))}")
    return found[split]
