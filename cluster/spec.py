"""JobSpec: what a user submits. No torch, no Ray, no database here."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, field_validator, model_validator

from cluster.calibrate.promise import Promise
from engine.errors import BadInput
from engine.spec import Compile, Device, DType, PolicySpec, Spec, first_complaint, parse_policy
from workers.benchmarks.spec import parse_benchmark

#: the kind, and the label, of the runs of a trace: they are no policy's, for nothing is decided
TRACE = "trace"


class Generation(Spec):
    max_new_tokens: int = Field(32, ge=1)
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        8, description="auto: as large as memory allows and pays off, found out when the job is prepared"
    )

    @field_validator("batch_size", mode="wrap")
    @classmethod
    def _in_one_sentence(cls, value: Any, read: ValidatorFunctionWrapHandler) -> Any:
        try:
            return read(value)
        except ValidationError:  # one complaint for each of the two types
            raise ValueError(
                f"generation.batch_size is {value!r}; give a whole number of at least 1, or auto."
            ) from None


class JobSpec(Spec):
    """A model, its exits, benchmarks and policies."""

    name: str = Field("unnamed", min_length=1)
    model: str = Field(min_length=1)
    exits: str | None = None
    device: Device = "auto"
    device_class: str | None = Field(
        None, min_length=1, description="only devices of this class do the job; named as reports and doctor name it"
    )
    dtype: DType = "float32"
    threads: int | None = Field(None, ge=1, description="per worker; this machine's cores over its workers when absent")
    compile: Compile = Field("auto", description="torch.compile: auto where it pays")
    seed: int = 0
    generation: Generation = Generation()
    benchmarks: list[Any] = Field(min_length=1)
    policies: list[Any] = Field(["full"], min_length=1, validate_default=True)
    trace: Literal["reference", "full"] | None = Field(
        None, description="a trace in the place of policies: of the reference, or of the model's own completion"
    )
    promise: Promise | None = Field(None, description="of one of the policies, as `shortstop calibrate` writes it")
    metrics: list[str] | None = Field(
        None, min_length=1, description="`all`, or names; those computed by default when absent"
    )
    shard_batches: int = Field(2, ge=1, description="batches in a shard")
    priority: int = Field(0, ge=-1000, le=1000)

    @field_validator("compile", mode="before")
    @classmethod
    def _read_switch(cls, value: Any) -> Any:
        """YAML reads a bare `on` as true and `off` as false."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @field_validator("benchmarks")
    @classmethod
    def _read_benchmarks(cls, values: list[Any]) -> list[Spec]:
        return [parse_benchmark(value) for value in values]

    @field_validator("policies")
    @classmethod
    def _read_policies(cls, values: list[Any]) -> list[PolicySpec]:
        """`full` is the baseline of every comparison: added in front when no policy is it."""
        specs = [parse_policy(value) for value in values]
        return specs if any(spec.kind == "full" for spec in specs) else [parse_policy("full"), *specs]

    @model_validator(mode="before")
    @classmethod
    def _policies_given(cls, data: Any) -> Any:
        """A job without policies has nothing to do, but a trace."""
        if isinstance(data, dict) and "policies" not in data and data.get("trace") is None:
            raise ValueError("field 'policies' is missing; add it.")
        return data

    @model_validator(mode="after")
    def _trace_alone(self) -> "JobSpec":
        if self.trace is not None and any(spec.kind != "full" for spec in self.policies):
            raise ValueError(
                f"policies: a trace ({self.trace!r}) runs none; leave the field out, and ask with `shortstop replay`."
            )
        if self.trace is not None and self.exits is None:
            raise ValueError("exits: a trace needs some, and none are given; name a bundle in the field `exits`.")
        if self.trace is not None and not all(getattr(asked, "store_text", True) for asked in self.benchmarks):
            raise ValueError(
                "benchmarks: store_text is false, and a trace keeps the tokens of its targets, which spell the text; "
                "leave it out, or trace another benchmark."
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _class_says_the_device(cls, data: Any) -> Any:
        wanted = data.get("device_class") if isinstance(data, dict) else None
        if not isinstance(wanted, str):
            return data
        of, device = device_of(wanted), data.get("device", "auto")
        if device not in ("auto", of):
            raise ValueError(f"device is {device!r}, but device_class {wanted!r} is of {of}; leave one of the two out.")
        return data | {"device": of}

    @model_validator(mode="after")
    def _promise_is_of_this(self) -> "JobSpec":
        """Evidence goes with the policy, and the length, that it was found for."""
        promise = self.promise
        if promise is None:
            return self
        if parse_policy(promise.policy) not in self.policies:
            raise ValueError(
                f"promise: it was given for {promise.policy}, which is not among the policies; give them as they were, "
                "or leave the promise out."
            )
        if promise.max_new_tokens != self.generation.max_new_tokens:
            raise ValueError(
                f"generation.max_new_tokens is {self.generation.max_new_tokens}, and the promise was given for "
                f"{promise.max_new_tokens}; give that, or leave the field promise out."
            )
        return self

    @model_validator(mode="after")
    def _labels_differ(self) -> "JobSpec":
        labels = [spec.label for spec in self.policies]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"policies: {label!r} is there twice; remove one or give it another name")
        return self

    def dump(self) -> dict[str, Any]:
        """The spec as JSON that `JobSpec` reads back."""
        return self.model_dump(mode="json", exclude={"benchmarks", "policies"}) | {
            "benchmarks": [asked.model_dump(mode="json", exclude_defaults=True) for asked in self.benchmarks],
            "policies": [policy.dump() for policy in self.policies],
        }


def device_of(device_class: str) -> Device:
    """`cpu` or `cuda`: which a device class is one of (see `engine.device.describe_device_class`)."""
    return "cpu" if device_class.startswith("cpu ") else "cuda"


def parse_job(value: dict[str, Any] | JobSpec) -> JobSpec:
    """Check what a spec file holds. Raises `BadInput`."""
    if isinstance(value, JobSpec):
        return value
    if not isinstance(value, dict):
        raise BadInput(f"spec: {value!r} is not a mapping; give at least model, benchmarks and policies.")
    try:
        return JobSpec.model_validate(value)
    except ValidationError as error:
        raise BadInput(f"spec: {complaint(error)}") from None


def complaint(error: ValidationError) -> str:
    """The first fault as one sentence; where a validator of ours found it, in that validator's words."""
    cause = error.errors()[0].get("ctx", {}).get("error")
    return str(cause) if isinstance(cause, ValueError) else first_complaint(error)


def read_job(source: str | Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Read a spec file (`-` is standard input) and apply overrides, see `override`. Raises `BadInput`."""
    return parse_job(override(read_yaml(source), overrides))


def read_yaml(source: str | Path, *, word: str = "spec", like: str = "model: smollm2-135m") -> dict[str, Any]:
    """Read a file (`-` is standard input) that holds one mapping, told of as a `word`. Raises `BadInput`."""
    name = "standard input" if str(source) == "-" else str(source)
    try:
        text = sys.stdin.read() if str(source) == "-" else Path(source).read_text(encoding="utf-8")
        value = yaml.safe_load(text)
    except OSError as error:
        raise BadInput(
            f"{word} {name!r} cannot be read ({error.strerror}); give the path of a YAML file, or - ."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: {getattr(error, 'problem', None)}" if mark else str(error).splitlines()[0]
        raise BadInput(f"{word} {name!r} is not YAML ({where}); correct it there.") from None
    if not isinstance(value, dict):
        raise BadInput(f"{word} {name!r} does not hold a mapping; write lines such as `{like}`.")
    return value


def override(spec: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set fields by path: `generation.batch_size=4`, `policies.1.threshold=0.9` (counted from 0). Raises `BadInput`."""
    for text in overrides:
        path, equals, written = text.partition("=")
        steps = path.split(".")
        if not equals or not all(steps):
            raise BadInput(f"override {text!r}: write dotted.path=value, like generation.batch_size=4.")
        try:
            value = yaml.safe_load(written)
            spec = _set(spec, _through_name(spec, steps, value), value)
        except yaml.YAMLError:
            raise BadInput(f"override {text!r}: {written!r} is not a YAML value; put it in quotes.") from None
        except (LookupError, TypeError, ValueError, AttributeError):
            raise BadInput(
                f"override {text!r}: the spec has no {path!r} to set; paths count list entries from 0."
            ) from None
    return spec


def _through_name(spec: dict[str, Any], steps: list[str], value: Any) -> list[str]:
    """`policies.1.threshold` means `policies.1.confidence.threshold` where entry 1 is a `confidence`."""
    if steps[0] != "policies" or len(steps) != 3:
        return steps
    entry = spec["policies"][int(steps[1])]
    [kind] = [entry] if isinstance(entry, str) else entry
    # `policies.1.patience=3` sets the option, `policies.1.patience={patience: 3}` all options.
    return steps if steps[2] == kind and (value is None or isinstance(value, dict)) else [*steps[:2], kind, steps[2]]


def _set(node: Any, steps: list[str], value: Any) -> Any:
    """A copy of `node` in which the place at the end of `steps` holds `value`."""
    if not steps:
        return value
    step, *rest = steps
    if isinstance(node, list):
        index = range(len(node))[int(step)]
        return [_set(_opened(entry, rest), rest, value) if n == index else entry for n, entry in enumerate(node)]
    node = {} if node is None else node
    return {**node, step: _set(node.get(step), rest, value)}


def _opened(entry: Any, steps: list[str]) -> Any:
    """An entry that was given by its name only, as the mapping that can take options."""
    if not (steps and isinstance(entry, str)):
        return entry
    return {entry: {}} if entry == steps[0] else parse_benchmark(entry).model_dump(exclude_unset=True)
