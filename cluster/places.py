"""The places on a disk that a spec may name: one walk over them, and what they mean to who submits here.

`cluster.upload` has what they mean to a client, `cluster.api.allowed` to a server.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from cluster.spec import JobSpec
from engine.exits import known_exits
from engine.loading import models
from engine.spec import Spec
from workers.benchmarks.spec import CatalogueBenchmark, DatasetBenchmark, JsonlBenchmark, SourceBenchmark

#: the fields of a spec that may name a place
Field = Literal["model", "exits", "benchmark", "jsonl", "dataset", "source"]
_OF_BENCHMARK: tuple[tuple[type[Spec], Field], ...] = (
    (JsonlBenchmark, "jsonl"),
    (DatasetBenchmark, "dataset"),
    (SourceBenchmark, "source"),
)


def placed(spec: JobSpec, place: Callable[[Field, str], str]) -> JobSpec:
    """The spec with `place(field, value)` instead of each value that may name a place.

    Names of models, exits and benchmarks that everybody knows name none.
    """

    def benchmark(asked: Spec) -> Spec:
        if isinstance(asked, CatalogueBenchmark) and asked.is_file:
            return asked.model_copy(update={"benchmark": place("benchmark", asked.benchmark)})
        for kind, field in _OF_BENCHMARK:
            if isinstance(asked, kind):
                return asked.model_copy(update={field: place(field, getattr(asked, field))})
        return asked

    changes: dict[str, Any] = {"benchmarks": [benchmark(asked) for asked in spec.benchmarks]}
    if spec.model not in models:
        changes["model"] = place("model", spec.model)
    if spec.exits is not None and spec.exits not in known_exits():
        changes["exits"] = place("exits", spec.exits)
    return spec.model_copy(update=changes)


def anchored(spec: JobSpec, folder: Path) -> JobSpec:
    """The spec with every relative path that means something in `folder` made absolute."""
    return placed(spec, lambda field, value: str(found) if (found := meant(field, value, folder)) else value)


def meant(field: Field, value: str, folder: Path) -> Path | None:
    """The absolute path that a field names in `folder`: a file, there or not, or a folder that is."""
    path = (folder / Path(value).expanduser()).absolute()
    is_file = field in ("benchmark", "jsonl") or (field == "dataset" and path.suffix == ".parquet")
    return path if is_file or path.is_dir() else None
