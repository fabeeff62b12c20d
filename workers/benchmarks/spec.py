"""What a caller may ask of a benchmark. No torch, no datasets here."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from engine.errors import BadInput
from engine.spec import Spec, first_complaint
from workers.benchmarks.ends import Ends
from workers.benchmarks.lines import LANGUAGES, language_named

STORE_TEXT = Field(True, description="false: the record keeps hashes and metrics, no prompt, reference or completion")


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
    revision: str | None = Field(
        None, min_length=1, description="a branch, tag or commit of the folder's git repository; as it lies when absent"
    )
    task: Literal["random-cut", "next-line", "line-rest", "function-body", "single-line-infill"] = "next-line"
    language: str | list[str] = Field(
        "python", min_length=1, description="one, several, or `all`; told by the extension of a file's name"
    )
    include: list[str] = Field([], description="patterns as .gitignore has them: only files that one of them fits")
    exclude: list[str] = Field([], description="patterns as .gitignore has them: no file that one of them fits")
    ends: Ends | None = Field(
        None, description="where a completion ends, and a reference with it; the task's when absent"
    )
    samples: int | None = Field(500, ge=1)
    seed: int = 0
    store_text: bool = STORE_TEXT
    name: str | None = Field(None, min_length=1)

    @field_validator("language")
    @classmethod
    def _known(cls, value: str | list[str]) -> str | list[str]:
        for name in [value] if isinstance(value, str) else value:
            if name != "all" or not isinstance(value, str):
                language_named(name)
        return value

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _ends_fit(self) -> "SourceBenchmark":
        """What is cut by tokens has no end in the text, and a function's body ends where the function does."""
        only = {"random-cut": "text", "function-body": "function"}.get(self.task)
        if only is not None and self.ends not in (None, only):
            raise ValueError(f"ends is {self.ends!r}, but task {self.task} ends with {only!r}; leave ends out.")
        return self

    @property
    def languages(self) -> list[str]:
        """By name."""
        if self.language == "all":
            return list(LANGUAGES)
        return [self.language] if isinstance(self.language, str) else self.language

    @property
    def end(self) -> Ends:
        """Where completions end."""
        default: Ends = "text" if self.task == "random-cut" else "function" if self.task == "function-body" else "line"
        return self.ends or default


class RecordsBenchmark(Spec):
    """Records that say prompt and reference themselves, in fields that are named here."""

    prompt: str = "prompt"
    reference: str = "reference"
    id: str | None = Field(None, description="field of the sample's id; the record's number when absent")
    group: str | None = Field(None, description="field of the source group; the sample's id when absent")
    language: str = "python"
    ends: Ends = Field("line", description="where a completion ends, and a reference with it")
    test: str | None = Field(None, description="field of a program that passes behind prompt and completion")
    records: tuple[int, int] | None = Field(
        None, description="only these of the source: from the first, counted from 0, up to and without the second"
    )
    samples: int | None = Field(None, ge=1)
    seed: int = 0
    store_text: bool = STORE_TEXT
    name: str | None = Field(None, min_length=1)

    @field_validator("records")
    @classmethod
    def _in_order(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 0 <= value[0] < value[1]:
            raise ValueError(f"records is {list(value)}; give the first, counted from 0, and one past the last.")
        return value

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
    """A dataset of the library `datasets`: a folder that `save_to_disk` wrote, Parquet files, or a hub id."""

    dataset: str = Field(min_length=1)
    split: str = "test"
    config: str | None = Field(None, description="the dataset's configuration, where it has several")
    streaming: bool = Field(
        False, description="of the hub: read over the network, as far as needed, not fetched before"
    )


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
