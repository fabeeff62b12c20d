"""What is known by name: models, benchmarks, policies."""

from collections.abc import Mapping
from dataclasses import dataclass
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


def known_models() -> list[Known]:
    """The models known by name; folders and hub ids do as well."""
    from engine.loading import models

    return _described(models)


def known_benchmarks() -> list[Known]:
    """The benchmarks known by name; source code and JSONL do as well."""
    from workers.benchmarks.catalogue import benchmarks

    return _described(benchmarks)


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
