"""Datasets of the library `datasets`: saved to a folder, or on the hub. Code that comes with one is never run."""

import os
from typing import Any

from engine.errors import BadInput, UnknownName
from engine.registry import unknown
from workers.benchmarks.records import Record, samples_of
from workers.benchmarks.sample import Sample
from workers.benchmarks.spec import DatasetBenchmark


def dataset_samples(spec: DatasetBenchmark) -> list[Sample]:
    """A sample a row. Raises `BadInput` with the row's number, or where the dataset cannot be had."""
    where = f"dataset {spec.dataset!r}, split {spec.split!r}"
    return samples_of(spec, (Record(where, "row", i, row) for i, row in enumerate(_open(spec), start=1)))


def _open(spec: DatasetBenchmark) -> Any:
    import datasets

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        if os.path.isdir(os.path.expanduser(spec.dataset)):
            return _split(spec, datasets.load_from_disk(os.path.expanduser(spec.dataset)))
        return datasets.load_dataset(spec.dataset, spec.config, split=spec.split)
    except BadInput:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise BadInput(
            f"dataset {spec.dataset!r} cannot be had ({type(error).__name__}: {reason}); give a folder that "
            "save_to_disk wrote, or a hub id where there is a network."
        ) from None
    finally:
        if not bars:
            datasets.enable_progress_bars()


def _split(spec: DatasetBenchmark, found: Any) -> Any:
    """The split of a saved dataset; a folder may hold one dataset alone."""
    if not isinstance(found, dict):
        return found
    if spec.split not in found:
        raise UnknownName(f"dataset {spec.dataset!r}: {unknown('split', spec.split, list(found))}")
    return found[spec.split]
