"""What a caller may ask of a benchmark. No torch, no datasets here."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from engine.errors import BadInput
from engine.spec import Spec, first_complaint
from workers.benchmarks.ends import Ends


class CatalogueBenchmark(Spec):
    """A benchmark known by name: one of the catalogue or of an installed package; or the `.yaml` file that tells it."""

    benchmark: str = Field(min_length=1)
    samples: int | None = Field(None, ge=1, description="how many, drawn with the seed; all when absent")
    seed: int = 0

    @property
    def is_file(self) -> bool:
        """Whether `benchmark` is the path of a file that declares it, not a name."""
        return self.benchmark.endswith((".yaml", ".yml"))


class SourceBenchmark(Spec):
    """The source code in a folder, or of an installed package: the user's own repository is what people care about."""

    source: str = Field(min_length=1, description="a folder, or the name of an installed package")
    task: Literal["random-cut", "next-line"] = "next-line"
    language: str = "python"
    samples: int | None = Field(500, ge=1)
    seed: int = 0
    name: str | None = Field(None, min_length=1)


class RecordsBenchmark(Spec):
    """Records that say prompt and reference themselves, in fields that are named here."""

    prompt: str = "prompt"
    reference: str = "reference"
    id: str | None = Field(None, description="field of the sample's id; the record's number when absent")
    group: str | None = Field(None, description="field of the source group; the sample's id when absent")
    language: str = "python"
    ends: Ends = Field("line", description="where a completion ends, and a reference with it")
    test: str | None = Field(None, description="field of a program that passes behind prompt and completion")
    samples: int | None = Field(None, ge=1)
    seed: int = 0
    name: str | None = Field(None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _as_it_was_written_first(cls, value: Any) -> Any:
        """Jobs that are in the record say `ends_with_line`."""
        if isinstance(value, dict) and isinstance(value.get("ends_with_line"), bool) and "ends" not in value:
            ends = "line" if value["ends_with_line"] else "text"
            return {key: one for key, one in value.items() if key != "ends_with_line"} | {"ends": ends}
        return value


class JsonlBenchmark(RecordsBenchmark):
    """A file of JSON lines: `.jsonl`, `.json`, also `.gz`."""

    jsonl: str = Field(min_length=1)


class DatasetBenchmark(RecordsBenchmark):
    """A dataset of the library `datasets`: a folder that `save_to_disk` wrote, or a hub id."""

    dataset: str = Field(min_length=1)
    split: str = "test"
    config: str | None = Field(None, description="the dataset's configuration, where it has several")


BenchmarkSpec = Annotated[
    CatalogueBenchmark | SourceBenchmark | JsonlBenchmark | DatasetBenchmark, Field(union_mode="left_to_right")
]

_KINDS: dict[str, type[Spec]] = {
    "benchmark": CatalogueBenchmark,
    "source": SourceBenchmark,
    "jsonl": JsonlBenchmark,
    "dataset": DatasetBenchmark,
}


def parse_benchmark(value: str | dict[str, Any] | Spec) -> Any:
    """Read `humaneval-lines`, `source:<package or folder>` or one of the kinds of mapping. Raises `BadInput`."""
    if isinstance(value, Spec):
        return value
    if isinstance(value, str):
        value = {"source": value.removeprefix("source:")} if value.startswith("source:") else {"benchmark": value}
    kinds = [kind for kind in _KINDS if isinstance(value, dict) and kind in value]
    if len(kinds) != 1:
        raise BadInput(f"benchmark {value!r}: give a name, or a mapping with exactly one of {', '.join(_KINDS)}.")
    try:
        return _KINDS[kinds[0]].model_validate(value)
    except ValidationError as error:
        raise BadInput(f"benchmark {value[kinds[0]]!r}: {first_complaint(error)}") from None
