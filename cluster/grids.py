"""What `shortstop replay` may be asked: policies one by one, or as grids of their options. No torch, no database."""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
import yaml
from pydantic import Field, ValidationError

from cluster.spec import complaint
from engine.errors import BadInput
from engine.replay.decide import Oracle
from engine.spec import PolicySpec, Spec, first_complaint, parse_policy
from engine.spec import policies as registry
from workers.pinned import Pinned

#: policies of one replay: a table of more is nobody's, and its figures would not fit into memory beside each other
MOST_POLICIES = 20_000
#: of a policy on a token and exit point, about, on one core
SECONDS_A_CELL = 20e-9

_STEPS = {"from", "to", "steps"}


class ReplaySpec(Spec):
    """Policies, and what they were made for: where it is said, the trace must be of the same."""

    policies: list[Any] = Field(min_length=1, description="as in a spec; an option may be a list of values")
    model: str | None = None
    exits: str | None = None
    benchmark: str | None = None
    weights_hash: str | None = None
    exits_hash: str | None = None
    content_hash: str | None = None


def parse_replay(value: Any) -> ReplaySpec:
    """From what a file or an argument holds: one policy, a list of them, or a mapping with `policies`.

    Raises `BadInput`.
    """
    if isinstance(value, dict) and "policies" in value:
        try:
            return ReplaySpec.model_validate(value)
        except ValidationError as error:
            raise BadInput(f"replay: {complaint(error)}") from None
    return ReplaySpec(policies=value if isinstance(value, list) and value else [value])


def read_replay(text: str) -> ReplaySpec:
    """From a YAML file, or from YAML itself. Raises `BadInput`."""
    file = Path(text).expanduser()
    is_file = len(text) < 4096 and "\n" not in text and "{" not in text and file.suffix in (".yaml", ".yml", ".json")
    try:
        return parse_replay(yaml.safe_load(file.read_text(encoding="utf-8") if is_file else text))
    except OSError as error:
        raise BadInput(f"policies {text!r} cannot be read ({error.strerror}); give a YAML file, or YAML.") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise BadInput(
            f"policies {text!r} is not YAML; write it like '{{confidence: {{threshold: [0.8, 0.9]}}}}'."
        ) from None


def expand(entries: Sequence[Any], tokens: int, points: int) -> list[PolicySpec]:
    """Every policy that the entries stand for, each once, in order.

    tokens, points: of the trace, to say how long it would take. Raises `BadInput` for unknown names and fields, and
    where there are too many.
    """
    count = sum(_count(entry) for entry in entries)
    if count > MOST_POLICIES:
        seconds = count * tokens * points * SECONDS_A_CELL
        raise BadInput(
            f"policies: the grid has {count:,} cells, which would take about {_told(seconds)} over {tokens:,} tokens "
            f"at {points} exit points; give at most {MOST_POLICIES:,}, with fewer values an option."
        )
    return list(dict.fromkeys(policy for entry in entries for policy in _cells(entry)))


def parse_replayed(value: Any) -> PolicySpec:
    """As `engine.spec.parse_policy`, and `oracle`, which only a replay knows. Raises `BadInput`."""
    kind, options = _named(value)
    if kind != Oracle.kind:
        return parse_policy(value)
    try:
        return Oracle.model_validate(options)
    except ValidationError as error:
        raise BadInput(f"policy 'oracle': {first_complaint(error)}") from None


def default_policies(pinned: Pinned) -> list[Any]:
    """What is asked where nobody says what: every kind that a trace can answer, from bold to timid."""
    bold_to_timid = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99, 0.999]
    early = [point for point in pinned.exit_points if point < pinned.n_layers]
    found: list[Any] = [
        "full",
        "oracle",
        {"confidence": {"threshold": bold_to_timid}},
        {"margin": {"threshold": bold_to_timid}},
        {"entropy": {"threshold": [0.01, 0.03, 0.1, 0.3, 1.0, 2.0]}},
        {"state-similarity": {"threshold": [0.8, 0.9, 0.95, 0.98, 0.99]}},
    ]
    if early:
        found.append({"fixed": {"exit_layer": early}})
    if len(early) > 1:
        found.append({"patience": {"patience": list(range(1, min(len(early), 4)))}})
    thresholds = [0.0, *bold_to_timid, 1.0]
    return found + [{"controller": {"exit": thresholds, "stop": thresholds}}] * pinned.controller


def _cells(entry: Any) -> Iterator[PolicySpec]:
    kind, options = _named(entry)
    axes = _axes(kind, options)
    for values in product(*axes.values()):
        yield parse_replayed({kind: dict(zip(axes, values, strict=True))} if axes else kind)


def _count(entry: Any) -> int:
    kind, options = _named(entry)
    count = 1
    for name, value in options.items():
        count *= _steps(kind, name, value) if _is_steps(value) else len(_values(kind, name, value))
    return count


def _axes(kind: str, options: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: _values(kind, name, value) for name, value in options.items()}


def _named(entry: Any) -> tuple[str, dict[str, Any]]:
    """A policy's kind and options. Raises `BadInput`."""
    if isinstance(entry, PolicySpec):
        entry = entry.dump()
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, dict) and len(entry) == 1:
        [(kind, options)] = entry.items()
        if isinstance(kind, str) and (options is None or isinstance(options, dict)):
            return kind, options or {}
    raise BadInput(
        f"policy {entry!r}: give a name, or one name with its options, like {{confidence: {{threshold: [0.8, 0.9]}}}}"
    )


def _values(kind: str, name: str, value: Any) -> list[Any]:
    """The values of an option: several where it is a list, unless a list is what the option takes."""
    if _is_steps(value):
        steps = _steps(kind, name, value)
        return [round(float(number), 12) for number in np.linspace(value["from"], value["to"], steps)]
    if not isinstance(value, list):
        return [value]
    if _takes_list(kind, name) and not (value and all(isinstance(one, list) for one in value)):
        return [value]
    if not value:
        raise BadInput(f"policy {kind!r}: field {name!r} is an empty list; give values, or leave it out.")
    return value


def _is_steps(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == _STEPS


def _steps(kind: str, name: str, value: dict[str, Any]) -> int:
    ends = (value["from"], value["to"])
    numbers = all(isinstance(end, int | float) and math.isfinite(end) for end in ends)
    if not numbers or not isinstance(value["steps"], int) or value["steps"] < 2:
        raise BadInput(
            f"policy {kind!r}: field {name!r} is {value!r}; give numbers for from and to, and for steps a whole "
            "number from 2."
        )
    return int(value["steps"])


def _takes_list(kind: str, name: str) -> bool:
    if kind not in registry:
        return False
    field = registry[kind].model_fields.get(name)
    kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
    return any(get_origin(one) is tuple for one in kinds)


def _told(seconds: float) -> str:
    return f"{seconds / 60:,.0f} minutes" if seconds >= 120 else f"{seconds:,.0f} seconds"
