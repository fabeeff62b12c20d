"""From what a caller asked for to a benchmark: the names everyone knows, source code, files."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath

from engine.errors import BadInput
from engine.registry import Registry
from engine.spec import Spec
from workers.benchmarks.dataset import dataset_samples
from workers.benchmarks.declared import Declaration, known_declarations, load_declared, read_declaration
from workers.benchmarks.draw import draw
from workers.benchmarks.files import read_source
from workers.benchmarks.jsonl import jsonl_samples
from workers.benchmarks.sample import Benchmark, Sample, content_version
from workers.benchmarks.source import Tokenizer, cut_samples, random_cut_samples
from workers.benchmarks.spec import (
    BenchmarkSpec,
    CatalogueBenchmark,
    DatasetBenchmark,
    JsonlBenchmark,
    RecordsBenchmark,
    SourceBenchmark,
)

#: of how files become samples; part of the version, so that a changed recipe never passes for the same benchmark
#: 2: what is generated, copied or not tracked is left out
SOURCE_RECIPE = "2"
#: 2: references end where completions do
RECORDS_RECIPE = "2"

#: of a source's options those that tell it from another, in the order of its name
_NAMING = ("revision", "task", "language", "include", "exclude", "ends", "samples", "seed")


@dataclass(frozen=True)
class CatalogueEntry:
    """A benchmark that is known by its name."""

    description: str
    load: Callable[[], Benchmark]  #: all of it; raises BadInput where its data is not installed
    declaration: Declaration | None = None  #: where a file tells it


def _declared(declaration: Declaration, *beside: Path) -> CatalogueEntry:
    return CatalogueEntry(declaration.description, partial(load_declared, declaration, *beside), declaration)


benchmarks: Registry[CatalogueEntry] = Registry(
    "benchmark",
    "benchmarks",
    {name: _declared(one) for name, one in known_declarations().items()},
)


def entry(name: str) -> CatalogueEntry:
    """By name, or by the path of a `.yaml` file that declares it. Raises `BadInput`."""
    if not name.endswith((".yaml", ".yml")):
        return benchmarks[name]
    path = Path(os.path.expanduser(name))
    return _declared(read_declaration(path), path.parent)


def load_benchmark(spec: BenchmarkSpec, *, tokenizer_of: Callable[[], Tokenizer], max_new_tokens: int) -> Benchmark:
    """The samples that a spec asks for: the same on every machine that has the same files.

    A catalogue entry keeps its version. So does a source or a file that the caller gave a `name`: its content may not
    change under that name. Without one the version carries a digest of the content.

    `tokenizer_of` is called only where the tokenizer decides the cut (`random-cut`), whose references are as long as
    the completions, `max_new_tokens`. Raises `BadInput` for what cannot be found or read, and for an empty benchmark.
    """
    match spec:
        case CatalogueBenchmark():
            benchmark = _drawn(entry(spec.benchmark).load(), spec)
        case SourceBenchmark():
            benchmark = _from_source(spec, tokenizer_of, max_new_tokens)
        case JsonlBenchmark():
            benchmark = _from_records(spec, f"jsonl:{_last_part(spec.jsonl)}", *jsonl_samples(spec))
        case DatasetBenchmark():
            benchmark = _from_records(spec, f"dataset:{_last_part(spec.dataset)}", *dataset_samples(spec))
    if not benchmark.samples:
        raise BadInput(_why_empty(benchmark))
    return benchmark


def _from_source(spec: SourceBenchmark, tokenizer_of: Callable[[], Tokenizer], max_new_tokens: int) -> Benchmark:
    files = read_source(spec)
    dropped: list[str] = []
    if spec.task == "random-cut":
        samples = random_cut_samples(spec, files, tokenizer_of(), max_new_tokens)
    else:
        samples, dropped = cut_samples(spec, files)
    name = f"source:{_last_part(spec.source)}{_options(spec, *_NAMING)}"
    return Benchmark(
        name=spec.name or name,
        version=_version(spec, samples),
        ends=spec.end,
        samples=samples,
        left_out=[*files.left_out, *dropped],
        store_text=spec.store_text,
    )


def _from_records(spec: RecordsBenchmark, name: str, whole: list[Sample], left_out: list[str]) -> Benchmark:
    samples = _subset(whole, spec.samples, spec.seed)
    name = f"{name}{_options(spec, 'split', 'config', 'records', 'samples', 'seed')}"
    return Benchmark(spec.name or name, _version(spec, samples), spec.ends, samples, left_out, spec.store_text)


def _drawn(whole: Benchmark, spec: CatalogueBenchmark) -> Benchmark:
    """The drawn part, under a name of its own: it is another benchmark than the whole."""
    if spec.samples is None or spec.samples >= len(whole.samples):
        return whole
    samples = _subset(whole.samples, spec.samples, spec.seed)
    return replace(whole, name=f"{whole.name}{_options(spec, 'samples', 'seed')}", samples=samples)


def _subset(samples: list[Sample], count: int | None, seed: int) -> list[Sample]:
    """Drawn over the source groups, in the benchmark's order."""
    if count is None or count >= len(samples):
        return samples
    places: dict[str, list[int]] = {}
    for place, sample in enumerate(samples):
        places.setdefault(sample.source_group, []).append(place)
    drawn = draw(list(places), lambda group: len(places[group]), count, seed)
    return [samples[place] for place in sorted(places[group][index] for group, index in drawn)]


def _version(spec: SourceBenchmark | RecordsBenchmark, samples: list[Sample]) -> str:
    recipe = SOURCE_RECIPE if isinstance(spec, SourceBenchmark) else RECORDS_RECIPE
    return recipe if spec.name else content_version(recipe, samples)


def _options(spec: Spec, *fields: str) -> str:
    """The options that differ from their defaults, as a policy's label shows them."""
    given = spec.model_dump(include=set(fields), exclude_defaults=True)
    return "".join(f" {field}={given[field]}" for field in fields if field in given)


def _last_part(path: str) -> str:
    return PurePath(path).name or path


def _why_empty(benchmark: Benchmark) -> str:
    sentence = f"benchmark {benchmark.name!r} has no samples; give a source, language or file that has some."
    if benchmark.left_out:
        sentence += f" {len(benchmark.left_out)} pieces of input were left out; the first: {benchmark.left_out[0]}"
    return sentence
