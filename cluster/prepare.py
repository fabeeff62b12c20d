"""Preparing a job: everything that could change later is resolved once and pinned."""

import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path
from platform import python_version
from typing import Any

from cluster.spec import TRACE, JobSpec
from db import errors as record_errors
from db import jobs
from db.estimating import Estimate, estimate
from db.queue import Lease
from db.records import PlannedBenchmark, PlannedPolicy
from db.session import Database
from engine.errors import BadInput
from engine.exits import ExitsManifest, after_exit, check_policy, check_weights, exits_hash, find_exits, read_manifest
from engine.loading import ModelFacts, load_tokenizer, resolve_model
from engine.shapes import head_parameters, model_shape
from engine.spec import Original, PolicySpec
from workers.benchmarks.catalogue import load_benchmark
from workers.benchmarks.sample import Benchmark
from workers.bundle import pack
from workers.holding import Holding, patiently
from workers.pinned import Pinned
from workers.scoring.metrics import executed_metrics, metrics, wanted_metrics

#: packages whose version may change a token, a score or a figure
_VERSIONED = ("shortstop", "torch", "transformers", "tokenizers", "safetensors", "numpy", "rapidfuzz", "sacrebleu")

#: that `auto` leaves of every benchmark: a batch is the unit of timing, and the interval of a speedup needs several
_FEWEST_BATCHES = 12


@dataclass(frozen=True)
class Resolved:
    """A JobSpec with all its names looked up and all its inputs read."""

    pinned: Pinned
    benchmarks: list[Benchmark]
    policies: list[PlannedPolicy]
    exits: Path | None  #: the bundle's folder


@dataclass(frozen=True)
class ValidatedBenchmark:
    """What a job would do with one benchmark."""

    name: str
    version: str
    content_hash: str
    samples: int
    batches: int
    shards: int
    left_out: list[str]  #: a sentence for each piece of input that was passed over


@dataclass(frozen=True)
class Validation:
    """What a job would do: the outcome of a dry run."""

    model: str
    n_layers: int
    exits: str | None
    exit_points: tuple[int, ...]
    batch_size: int  #: what `auto` came to, where the spec says so
    policies: list[str]  #: labels, in the report's order
    benchmarks: list[ValidatedBenchmark]
    estimate: Estimate | None  #: None where this model was never timed on this device class


def prepare(db: Database, lease: Lease, *, workers: int = 1) -> None:
    """Do a prepare task: resolve the job's spec and write its runs and shards.

    workers: how many are to share this machine, for the threads of each where the spec names none. Bad input fails the
    job with its sentence and is raised: `engine.errors.BadInput` or `db.errors.BadInput`. Raises `LeaseLost`.
    """
    spec = JobSpec.model_validate(jobs.job(db, lease.job_id).spec)
    try:
        with Holding(db, lease) as holding:
            resolved = resolve(spec, workers=workers)
            artifacts = [] if resolved.exits is None else [_artifact(resolved.exits)]
            holding.check()
        plan = partial(
            jobs.plan_job,
            db,
            lease,
            pinned=resolved.pinned.model_dump(mode="json"),
            benchmarks=[planned_benchmark(benchmark) for benchmark in resolved.benchmarks],
            artifacts=artifacts,
            policies=resolved.policies,
        )
        patiently(plan)
    except (BadInput, record_errors.BadInput) as error:
        jobs.fail_job(db, lease.job_id, str(error))
        raise


def validate(spec: JobSpec, *, workers: int = 1, db: Database | None = None) -> Validation:
    """Look up and read all that a job needs, and say what it would do. Writes nothing. Raises `BadInput`.

    workers: how many are to share this machine, as in `prepare`. db: the record whose earlier jobs say how long it
    would take.
    """
    resolved = resolve(spec, workers=workers)
    pinned = resolved.pinned
    likely = (
        None
        if db is None
        else estimate(
            db,
            weights_hash=pinned.weights_hash,
            device_class=pinned.device_class,
            samples=sum(len(benchmark.samples) for benchmark in resolved.benchmarks),
            max_new_tokens=pinned.max_new_tokens,
            policies=[policy.kind for policy in resolved.policies],
        )
    )
    return Validation(
        model=pinned.model,
        n_layers=pinned.n_layers,
        exits=pinned.exits,
        exit_points=pinned.exit_points,
        batch_size=pinned.batch_size,
        policies=[policy.label for policy in resolved.policies],
        benchmarks=[_validated(benchmark, pinned) for benchmark in resolved.benchmarks],
        estimate=likely,
    )


def resolve(spec: JobSpec, *, workers: int = 1) -> Resolved:
    """Look up every name of a spec and read every input. Raises `BadInput`, `WeightsMismatch`."""
    from engine.architectures import check_family
    from engine.device import describe_device_class, find_device

    facts = resolve_model(spec.model)
    check_family(facts.family)
    load_tokenizer(spec.model)
    if spec.generation.max_new_tokens >= facts.max_context:
        raise BadInput(
            f"generation.max_new_tokens is {spec.generation.max_new_tokens}, but model {facts.name!r} has room for "
            f"{facts.max_context} tokens, prompt included; ask for fewer."
        )
    folder = None if spec.exits is None else find_exits(spec.exits, facts)
    manifest = None if folder is None else read_manifest(folder)
    policies = with_references(spec.policies, manifest)
    _check_exits(policies, manifest, facts)
    versions = metrics_of_workers(spec.metrics)
    benchmarks = _load_benchmarks(spec)
    _check_differ(benchmarks)
    device = find_device(spec.device)
    threads = spec.threads or max(1, cores() // workers)
    pinned = Pinned(
        model=facts.name,
        weights_hash=facts.weights_hash,
        tokenizer_hash=facts.tokenizer_hash,
        n_layers=facts.n_layers,
        vocab_size=facts.vocab_size,
        max_context=facts.max_context,
        exits=spec.exits,
        exits_hash=None if folder is None else exits_hash(folder),
        tuned_weights_hash=manifest.tuned_weights_hash if manifest else None,
        head=manifest.head if manifest else None,
        exit_points=manifest.exit_points if manifest else (),
        device=device.type,
        device_class=spec.device_class or describe_device_class(device, spec.dtype, threads),
        only_on=spec.device_class,
        dtype=spec.dtype,
        threads=threads,
        compile=spec.compile,
        seed=spec.seed,
        max_new_tokens=spec.generation.max_new_tokens,
        batch_size=_batch_size(spec, facts, folder, benchmarks, workers),
        shard_batches=spec.shard_batches,
        metrics=versions,
        benchmarks={benchmark.name: benchmark.content_hash for benchmark in benchmarks},
        withheld={
            benchmark.content_hash: asked.model_dump(mode="json", exclude_defaults=True)
            for asked, benchmark in zip(spec.benchmarks, benchmarks, strict=True)
            if not benchmark.store_text
        },
        versions=package_versions(),
        git_revision=git_revision(),
        **_traced(spec, facts, manifest, folder),
    )
    _check_promise(spec, pinned)
    planned = [planned_policy(policy, manifest) for policy in policies]
    if spec.trace is not None:
        planned = [PlannedPolicy(label=TRACE, kind=TRACE, spec={TRACE: {"target": spec.trace}})]
    return Resolved(pinned, benchmarks, planned, folder)


def with_references(policies: Sequence[PolicySpec], manifest: ExitsManifest | None) -> list[PolicySpec]:
    """The policies; where the exits tune the model, the model as it came stands behind `full`, the other reference."""
    if manifest is None or not manifest.tunes or any(policy.untuned for policy in policies):
        return list(policies)
    place = next(i for i, policy in enumerate(policies) if policy.kind == "full") + 1
    return [*policies[:place], Original(), *policies[place:]]


def _traced(spec: JobSpec, facts: ModelFacts, manifest: ExitsManifest | None, folder: Path | None) -> dict[str, Any]:
    """What a trace pins on top: all that replay needs to know where there are no weights. Raises `BadInput`."""
    if spec.trace is None:
        return {}
    if manifest is None or folder is None:
        raise BadInput("exits: a trace needs some, and none are given; name a bundle in the field `exits`.")
    return {
        "trace": spec.trace,
        "controller": manifest.controller is not None,
        "after_exit": after_exit(folder, manifest),
        "shape": asdict(model_shape(facts, spec.dtype)),
        "heads": head_parameters(facts, manifest),
    }


def _check_promise(spec: JobSpec, pinned: Pinned) -> None:
    """Whether weights and exits are those that a promise was given for. Raises `BadInput`."""
    for field in ("weights_hash", "exits_hash"):
        promised, here = getattr(spec.promise, field, None), getattr(pinned, field)
        if spec.promise is not None and promised != here:
            raise BadInput(
                f"promise: it was given for {field} {str(promised)[:12]}, and here it is {str(here)[:12]}; calibrate "
                "anew, or leave the field promise out."
            )


def metric_versions(names: Iterable[str] | None) -> dict[str, str]:
    """Version by metric name, see `wanted_metrics`. Raises `UnknownName`."""
    return {name: metrics[name].version for name in wanted_metrics(names)}


def metrics_of_workers(names: Iterable[str] | None) -> dict[str, str]:
    """`metric_versions` of what workers compute. Raises `BadInput` for what executes completions: they never do."""
    for name in executed_metrics(wanted_metrics(names)):
        raise BadInput(
            f"metrics: {name!r} executes what the model wrote, which no worker does; once the job has ended: "
            f"`shortstop rescore JOB --metric {name} --execute`."
        )
    return metric_versions(names)


def cores() -> int:
    """Processor cores that this process may use: its affinity, and the quota of its control group."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):  # no control group, or one without a limit
        return allowed


def _batch_size(
    spec: JobSpec, facts: ModelFacts, exits: Path | None, benchmarks: Sequence[Benchmark], workers: int
) -> int:
    """What the spec says, or what `auto` comes to on this machine as it is now."""
    from engine.device import find_device
    from engine.memory import rows_with_room

    if spec.generation.batch_size != "auto":
        return spec.generation.batch_size
    return rows_with_room(
        facts,
        spec.dtype,
        exits,
        find_device(spec.device),
        positions=min(_longest_prompt(spec.model, benchmarks) + spec.generation.max_new_tokens, facts.max_context),
        workers=workers,
        most=min((len(benchmark.samples) for benchmark in benchmarks), default=0) // _FEWEST_BATCHES,
    )


def _longest_prompt(model: str, benchmarks: Sequence[Benchmark]) -> int:
    """In tokens."""
    prompts = [sample.prompt for benchmark in benchmarks for sample in benchmark.samples]
    encoded = load_tokenizer(model)(prompts)["input_ids"] if prompts else []
    return max(map(len, encoded), default=0)


def _check_exits(policies: Iterable[PolicySpec], manifest: ExitsManifest | None, facts: ModelFacts) -> None:
    if manifest is not None:
        check_weights(manifest, facts)
    for policy in policies:
        check_policy(policy, manifest, facts.n_layers)


def _load_benchmarks(spec: JobSpec) -> list[Benchmark]:
    tokenizer_of = partial(load_tokenizer, spec.model)
    room = spec.generation.max_new_tokens
    return [load_benchmark(asked, tokenizer_of=tokenizer_of, max_new_tokens=room) for asked in spec.benchmarks]


def _check_differ(loaded: list[Benchmark]) -> None:
    """Two benchmarks of a job must not be one. Raises `BadInput`."""
    for place, benchmark in enumerate(loaded):
        for other in loaded[:place]:
            if benchmark.name == other.name or benchmark.content_hash == other.content_hash:
                raise BadInput(
                    f"benchmarks: {other.name!r} and {benchmark.name!r} have the same name or content; remove one, or "
                    "give one another name."
                )


def planned_benchmark(benchmark: Benchmark) -> PlannedBenchmark:
    """The benchmark as the record keeps it."""
    recorded = benchmark.recorded
    return PlannedBenchmark(
        name=benchmark.name,
        version=benchmark.version,
        content_hash=benchmark.content_hash,
        ends=benchmark.ends,
        samples=[(one.name, one.prompt, one.reference, one.language, one.source_group) for one in recorded],
        left_out=benchmark.left_out,
        tests=[one.test for one in recorded],
    )


def planned_policy(policy: PolicySpec, manifest: ExitsManifest | None) -> PlannedPolicy:
    """The policy as the record keeps it, under the name that it has with these exits."""
    label = policy.label
    if policy.kind == "sec" and policy.name is None and manifest is not None and manifest.head == "lens":
        label = f"sec-lens{label.removeprefix('sec')}"  # the paper's rule, but not the paper's heads
    return PlannedPolicy(label=label, kind=policy.kind, spec=policy.dump())


def _validated(benchmark: Benchmark, pinned: Pinned) -> ValidatedBenchmark:
    batches = ceil(len(benchmark.samples) / pinned.batch_size)
    return ValidatedBenchmark(
        name=benchmark.name,
        version=benchmark.version,
        content_hash=benchmark.content_hash,
        samples=len(benchmark.samples),
        batches=batches,
        shards=ceil(batches / pinned.shard_batches),
        left_out=benchmark.left_out,
    )


def _artifact(folder: Path) -> tuple[str, str, bytes]:
    return "exits", exits_hash(folder), pack(folder)


def package_versions() -> dict[str, str]:
    """Of Python, and of what may change a token, a score or a figure."""
    found = {"python": python_version()}
    for package in _VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """The commit that Shortstop runs from; None where it was installed from a package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
