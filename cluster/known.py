"""What is known by name: models, benchmarks, policies."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from engine.spec import PolicySpec

#: of an option, what a caller is told
_SAID = ("type", "const", "enum", "minimum", "maximum", "default", "description")


@dataclass(frozen=True)
class Known:
    """A name and what stands behind it."""

    name: str
    description: str


@dataclass(frozen=True)
class KnownPolicy(Known):
    """A policy and its options, those that must be given first."""

    options: list[dict[str, Any]]  #: name, required, and of the JSON schema what a caller is told


@dataclass(frozen=True)
class ShownBenchmark(Known):
    """A benchmark with three of its samples."""

    about: dict[str, Any]  #: what its declaration says, where there is one
    content_hash: str | None  #: None, as what follows, where it was not loaded
    samples: int | None
    left_out: list[str]  #: a sentence for each piece of input that was passed over
    examples: list[dict[str, Any]]  #: the first, the middle and the last sample


def known_models() -> list[Known]:
    """The models known by name; folders and hub ids do as well."""
    from engine.loading import models

    return _described(models)


def known_benchmarks() -> list[Known]:
    """The benchmarks known by name; source code and JSONL do as well."""
    from workers.benchmarks.catalogue import benchmarks

    return _described(benchmarks)


def shown_benchmark(name: str, *, fetch: bool = True) -> ShownBenchmark:
    """By name, or by the path of a file that declares it. Raises `BadInput`.

    fetch=False: one that may have to come over the network is not loaded.
    """
    from workers.benchmarks.catalogue import entry
    from workers.benchmarks.declared import shown

    found = entry(name)
    about = {} if found.declaration is None else shown(found.declaration)
    if not fetch and found.declaration is not None and found.declaration.source.dataset is not None:
        return ShownBenchmark(name, found.description, about, None, None, [], [])
    whole = found.load()
    places = sorted({0, len(whole.samples) // 2, len(whole.samples) - 1}) if whole.samples else []
    examples = [asdict(whole.samples[place]) for place in places]
    return ShownBenchmark(
        name, found.description, about, whole.content_hash, len(whole.samples), whole.left_out, examples
    )


def known_policies() -> list[KnownPolicy]:
    """The policies and their options."""
    from engine.spec import policies

    return [_policy(kind, spec) for kind, spec in policies.items()]


def _described(entries: Mapping[str, Any]) -> list[Known]:
    return [Known(name, entry.description) for name, entry in entries.items()]


def _policy(kind: str, spec: type[PolicySpec]) -> KnownPolicy:
    fields = spec.model_json_schema()
    options = [
        {"name": name, "required": name in fields.get("required", [])}
        | {key: field[key] for key in _SAID if key in field}
        for name, field in fields.get("properties", {}).items()
        if name != "name"
    ]
    options.sort(key=lambda option: not option["required"])
    return KnownPolicy(kind, " ".join((spec.__doc__ or "").split()), options)
