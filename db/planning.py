"""Planning: what a prepare task resolved becomes samples, runs and shards; and so does a policy that is added."""

from collections.abc import Collection, Sequence
from itertools import accumulate, product, zip_longest
from statistics import median
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from db import events, schema
from db.clock import now
from db.errors import BadInput, Conflict, Missing
from db.events import LOCAL, What
from db.queue import NEW_TASK, Lease, complete, storable
from db.records import JobState, PlannedBenchmark, PlannedPolicy
from db.session import Database
from db.tables import artifact, benchmark, benchmark_name, insert_new, job, run, sample, task

#: what a decoded token costs, in characters of prompt: prefill takes about six tokens in that time, of four characters
DECODED_COST = 24
#: a shard that costs more than so many ordinary ones is cut, as far as there are whole batches
MOST_COST = 2

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
    check(benchmarks, policies)
    with db.write() as connection:
        if not complete(connection, lease):
            return
        _keep_artifacts(connection, artifacts)
        ids = keep_benchmarks(connection, benchmarks)
        add_runs(connection, lease.job_id, benchmarks, ids, policies)
        ready = update(job).where(job.c.id == lease.job_id).values(state=JobState.READY, pinned=pinned)
        priority = connection.execute(ready.returning(job.c.priority)).scalar_one()
        decoded = pinned.get("max_new_tokens", 0) * len(policies)
        costs = {}
        for planned in benchmarks:
            prompts = [len(fields[1]) for fields in planned.samples]
            costs[ids[planned.content_hash]] = batch_costs(prompts, pinned["batch_size"], decoded)
        _add_shards(connection, lease.job_id, priority, costs, pinned["shard_batches"])
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
            raise Missing(f"job {job_id} does not exist; `shortstop list` shows those that do.")
        if found.state != JobState.DONE:
            raise Conflict(f"job {job_id} is {found.state}; a policy can be added to a job that is done.")
        runs = connection.execute(select(run).where(run.c.job_id == job_id).order_by(run.c.position)).all()
        if policy.label in {one.policy for one in runs}:
            raise Conflict(f"policies: job {job_id} has {policy.label!r} already; give the new one another name.")
        for place, benchmark_id in enumerate(dict.fromkeys(one.benchmark_id for one in runs)):
            of_benchmark = [one for one in runs if one.benchmark_id == benchmark_id]
            add_run(connection, of_benchmark, place, policy)
        shards = _add_shards_again(connection, found, {one.benchmark_id for one in runs})
        spec = found.spec | {"policies": [*found.spec.get("policies", []), policy.spec]}
        again = {"state": JobState.RUNNING, "finished_at": None, "paused": False, "spec": spec}
        connection.execute(update(job).where(job.c.id == job_id).values(again))
        # what `db.cancelling` needs to take it back
        before = {"label": policy.label, "first_task": min(shards), "finished_at": found.finished_at}
        events.record(connection, job_id, who, What.POLICY_ADDED, policy=policy.spec, **before)


def add_run(connection: Connection, earlier: Sequence[Row[Any]], place: int, policy: PlannedPolicy) -> int:
    """Behind the other runs of its benchmark, with the scores' revision that they have. Returns its id.

    place: so many runs were added before these, which move on by as many places.
    """
    move_on(connection, earlier, place)
    last = earlier[-1]
    row = {name: getattr(last, name) for name in ("job_id", "benchmark_id", "benchmark", "score_revision")}
    row |= {"position": last.position + place + 1}
    row |= {"policy": policy.label, "policy_kind": policy.kind, "policy_spec": policy.spec}
    id: int = connection.execute(insert(run).values(row).returning(run.c.id)).scalar_one()
    return id


def move_on(connection: Connection, runs: Sequence[Row[Any]], places: int) -> None:
    """In the report's order."""
    for one in runs if places else ():
        connection.execute(update(run).where(run.c.id == one.id).values(position=one.position + places))


def _add_shards_again(connection: Connection, of_job: Row[Any], benchmark_ids: Collection[int]) -> Sequence[int]:
    """Shards over the whole of each benchmark. Returns their ids."""
    decoded = of_job.pinned.get("max_new_tokens", 0)
    costs = {}
    for benchmark_id in sorted(benchmark_ids):
        lengths = select(func.length(sample.c.prompt)).where(sample.c.benchmark_id == benchmark_id)
        prompts = connection.execute(lengths.order_by(sample.c.position)).scalars().all()
        costs[benchmark_id] = batch_costs(prompts, of_job.pinned["batch_size"], decoded)
    return _add_shards(connection, of_job.id, of_job.priority, costs, of_job.pinned["shard_batches"])


def batch_costs(prompts: Sequence[int], batch_size: int, decoded: int) -> list[int]:
    """What each batch is estimated to cost, in characters of prompt.

    prompts: characters of each; a batch is as long as its longest. decoded: tokens a row that all policies may write.
    """
    batches = (prompts[first : first + batch_size] for first in range(0, len(prompts), batch_size))
    return [len(batch) * (max(batch) + DECODED_COST * decoded) for batch in batches]


def check(benchmarks: Sequence[PlannedBenchmark], policies: Sequence[PlannedPolicy]) -> None:
    """Raises `BadInput` for benchmarks and policies that cannot be kept together as one job."""
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


def keep_benchmarks(connection: Connection, benchmarks: Sequence[PlannedBenchmark]) -> dict[str, int]:
    """Their ids by content hash, written now unless they were before. Raises `BadInput` for a name that is taken."""
    # in one order for all jobs: two that bring the same benchmarks wait for each other, never in a circle
    ordered = sorted(benchmarks, key=lambda one: one.content_hash)
    return {planned.content_hash: _keep_benchmark(connection, planned) for planned in ordered}


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


def add_runs(
    connection: Connection,
    job_id: int,
    benchmarks: Sequence[PlannedBenchmark],
    ids: dict[str, int],
    policies: Sequence[PlannedPolicy],
) -> None:
    """Every policy on every benchmark. ids: of the benchmarks, by content hash."""
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
    connection: Connection, job_id: int, priority: int, costs: dict[int, list[int]], shard_batches: int
) -> Sequence[int]:
    """costs: of every batch, by benchmark. Returns their ids."""
    sums = {benchmark_id: [0, *accumulate(of_batches)] for benchmark_id, of_batches in costs.items()}
    extents = [
        (benchmark_id, first, min(first + shard_batches, len(of_batches)))
        for benchmark_id, of_batches in costs.items()
        for first in range(0, len(of_batches), shard_batches)
    ]
    most = MOST_COST * median(sums[one][end] - sums[one][first] for one, first, end in extents)
    shard = NEW_TASK | {"job_id": job_id, "kind": "shard", "priority": priority}
    rows = [
        shard | {"benchmark_id": one, "first_batch": a, "end_batch": b, "cost": sums[one][b] - sums[one][a]}
        for one, first, end in extents
        for a, b in _cut(sums[one], first, end, most)
    ]
    return connection.execute(insert(task).returning(task.c.id), rows).scalars().all()


def _cut(sums: list[int], first: int, end: int, most: float) -> list[tuple[int, int]]:
    """The extent in halves of halves, none of which costs more than `most` unless it is one batch."""
    if end - first == 1 or sums[end] - sums[first] <= most:
        return [(first, end)]
    middle = (first + end) // 2
    return [*_cut(sums, first, middle, most), *_cut(sums, middle, end, most)]
