"""Planning: what a prepare task resolved becomes samples, runs and shards; and so does a policy that is added."""

from collections.abc import Sequence
from itertools import product, zip_longest
from math import ceil
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from db import events, schema
from db.clock import now
from db.errors import BadInput
from db.events import LOCAL, What
from db.queue import NEW_TASK, Lease, complete, storable
from db.records import JobState, PlannedBenchmark, PlannedPolicy
from db.session import Database
from db.tables import artifact, benchmark, benchmark_name, insert_new, job, run, sample, task

_SAMPLE_FIELDS = ("name", "prompt", "reference", "language", "source_group")


def plan_job(
    db: Database,
    lease: Lease,
    *,
    pinned: dict[str, Any],
    benchmarks: Sequence[PlannedBenchmark],
    artifacts: Sequence[tuple[str, str, bytes]],
    policies: Sequence[PlannedPolicy],
) -> None:
    """Write what preparing resolved, and complete the prepare task, in one transaction.

    pinned: everything that could change later; must hold `batch_size` and `shard_batches`.
    artifacts: (kind, hash, content), written once per hash.
    Samples are written once per content hash; runs are every policy on every benchmark. Raises `LeaseLost`, and
    `BadInput` where a benchmark is empty, there twice, or changed under its old name and version.
    """
    _check(benchmarks, policies)
    with db.write() as connection:
        if not complete(connection, lease):
            return
        _keep_artifacts(connection, artifacts)
        # in one order for all jobs: two that bring the same benchmarks wait for each other, never in a circle
        ids = {b.content_hash: _keep_benchmark(connection, b) for b in sorted(benchmarks, key=lambda b: b.content_hash)}
        _add_runs(connection, lease.job_id, benchmarks, ids, policies)
        ready = update(job).where(job.c.id == lease.job_id).values(state=JobState.READY, pinned=pinned)
        priority = connection.execute(ready.returning(job.c.priority)).scalar_one()
        for planned in benchmarks:
            n_batches = ceil(len(planned.samples) / pinned["batch_size"])
            benchmark_id = ids[planned.content_hash]
            _add_shards(connection, lease.job_id, priority, n_batches, pinned["shard_batches"], benchmark_id)
        events.record(connection, lease.job_id, lease.worker, What.PLANNED)


def add_policy(db: Database, job_id: int, policy: PlannedPolicy, *, who: str = LOCAL) -> None:
    """Give a job that is done one more policy: a run on each of its benchmarks, and shards that compute only these.

    Samples, batches and all that is pinned are the job's own; what its other runs left is not touched. The job is
    running again until the new shards have ended. Raises `BadInput` where it is not done or has a policy of that label.
    """
    with db.write() as connection:
        schema.hold(connection)
        found = connection.execute(select(job).where(job.c.id == job_id).with_for_update()).one_or_none()
        if found is None:
            raise BadInput(f"job {job_id} does not exist; `shortstop list` shows those that do.")
        if found.state != JobState.DONE:
            raise BadInput(f"job {job_id} is {found.state}; a policy can be added to a job that is done.")
        runs = connection.execute(select(run).where(run.c.job_id == job_id).order_by(run.c.position)).all()
        if policy.label in {one.policy for one in runs}:
            raise BadInput(f"policies: job {job_id} has {policy.label!r} already; give the new one another name.")
        shards: list[int] = []
        for place, benchmark_id in enumerate(dict.fromkeys(one.benchmark_id for one in runs)):
            of_benchmark = [one for one in runs if one.benchmark_id == benchmark_id]
            _add_run(connection, of_benchmark, place, policy)
            shards += _add_shards_again(connection, found, benchmark_id)
        spec = found.spec | {"policies": [*found.spec.get("policies", []), policy.spec]}
        again = {"state": JobState.RUNNING, "finished_at": None, "paused": False, "spec": spec}
        connection.execute(update(job).where(job.c.id == job_id).values(again))
        # what `db.cancelling` needs to take it back
        before = {"label": policy.label, "first_task": min(shards), "finished_at": found.finished_at}
        events.record(connection, job_id, who, What.POLICY_ADDED, policy=policy.spec, **before)


def _add_run(connection: Connection, earlier: Sequence[Row[Any]], place: int, policy: PlannedPolicy) -> None:
    """Behind the other runs of its benchmark, with the scores' revision that they have.

    place: of the benchmark; so many runs were added before these, which move on by as many places.
    """
    last = earlier[-1]
    for one in earlier if place else ():
        connection.execute(update(run).where(run.c.id == one.id).values(position=one.position + place))
    row = {name: getattr(last, name) for name in ("job_id", "benchmark_id", "benchmark", "score_revision")}
    row |= {"position": last.position + place + 1}
    row |= {"policy": policy.label, "policy_kind": policy.kind, "policy_spec": policy.spec}
    connection.execute(insert(run).values(row))


def _add_shards_again(connection: Connection, of_job: Row[Any], benchmark_id: int) -> Sequence[int]:
    """Shards over the whole benchmark, cut where the job's first ones were. Returns their ids."""
    size = select(benchmark.c.n_samples).where(benchmark.c.id == benchmark_id)
    n_batches = ceil(connection.execute(size).scalar_one() / of_job.pinned["batch_size"])
    cut = of_job.pinned["shard_batches"]
    return _add_shards(connection, of_job.id, of_job.priority, n_batches, cut, benchmark_id)


def _check(benchmarks: Sequence[PlannedBenchmark], policies: Sequence[PlannedPolicy]) -> None:
    if not benchmarks or not policies:
        raise BadInput(
            f"a job with {len(benchmarks)} benchmarks and {len(policies)} policies has no runs; add what lacks."
        )
    seen: dict[str, str] = {}
    for planned in benchmarks:
        if not planned.samples:
            raise BadInput(f"benchmark {planned.name!r} has no samples; widen its source or its options.")
        if planned.content_hash in seen:
            raise BadInput(
                f"benchmark {planned.name!r} has the same samples as {seen[planned.content_hash]!r}; remove one."
            )
        seen[planned.content_hash] = planned.name
        _check_text(planned)


def _check_text(planned: PlannedBenchmark) -> None:
    for fields, test in zip_longest(planned.samples, planned.tests):
        for field, value in zip((*_SAMPLE_FIELDS, "test"), (*fields, test or ""), strict=True):
            if storable(value) != value:
                raise BadInput(
                    f"benchmark {planned.name!r}, sample {fields[0]!r}: {field} holds a NUL or half a surrogate pair, "
                    "which no database keeps; remove it from the source."
                )


def _keep_artifacts(connection: Connection, artifacts: Sequence[tuple[str, str, bytes]]) -> None:
    for kind, hash, content in sorted(artifacts, key=lambda artifact: artifact[1]):
        insert_new(connection, artifact, {"hash": hash, "kind": kind, "content": content, "created_at": now()})


def _keep_benchmark(connection: Connection, planned: PlannedBenchmark) -> int:
    """The id of the benchmark with this content, written now unless it was before."""
    row = {name: getattr(planned, name) for name in ("name", "version", "content_hash", "ends")}
    row |= {"n_samples": len(planned.samples), "left_out": list(planned.left_out)}
    is_new = insert_new(connection, benchmark, row)
    by_hash = select(benchmark.c.id).where(benchmark.c.content_hash == planned.content_hash)
    benchmark_id: int = connection.execute(by_hash).scalar_one()
    if is_new:
        tests = planned.tests or [None] * len(planned.samples)
        rows = [
            dict(zip((*_SAMPLE_FIELDS, "test"), (*fields, test), strict=True))
            for fields, test in zip(planned.samples, tests, strict=True)
        ]
        connection.execute(
            insert(sample), [{"benchmark_id": benchmark_id, "position": i} | row for i, row in enumerate(rows)]
        )
    _keep_name(connection, planned, benchmark_id)
    return benchmark_id


def _keep_name(connection: Connection, planned: PlannedBenchmark, benchmark_id: int) -> None:
    """Bind name and version to the content; what they are bound to never changes."""
    row = {"name": planned.name, "version": planned.version, "benchmark_id": benchmark_id}
    if insert_new(connection, benchmark_name, row):
        return
    bound = connection.execute(
        select(benchmark.c.id, benchmark.c.content_hash)
        .join(benchmark_name)
        .where(benchmark_name.c.name == planned.name, benchmark_name.c.version == planned.version)
    ).one()
    if bound.id != benchmark_id:
        raise BadInput(
            f"benchmark {planned.name!r} version {planned.version!r} has changed: its content hash was "
            f"{bound.content_hash[:12]} and is {planned.content_hash[:12]}; give it another name or version."
        )


def _add_runs(
    connection: Connection,
    job_id: int,
    benchmarks: Sequence[PlannedBenchmark],
    ids: dict[str, int],
    policies: Sequence[PlannedPolicy],
) -> None:
    rows = [
        {
            "job_id": job_id,
            "position": position,
            "benchmark_id": ids[planned.content_hash],
            "benchmark": planned.name,
            "policy": policy.label,
            "policy_kind": policy.kind,
            "policy_spec": policy.spec,
            "score_revision": 1,
        }
        for position, (planned, policy) in enumerate(product(benchmarks, policies))
    ]
    connection.execute(insert(run), rows)


def _add_shards(
    connection: Connection, job_id: int, priority: int, n_batches: int, shard_batches: int, benchmark_id: int
) -> Sequence[int]:
    shard = NEW_TASK | {"job_id": job_id, "kind": "shard", "priority": priority, "benchmark_id": benchmark_id}
    shards = [
        shard | {"first_batch": first, "end_batch": min(first + shard_batches, n_batches)}
        for first in range(0, n_batches, shard_batches)
    ]
    return connection.execute(insert(task).returning(task.c.id), shards).scalars().all()
