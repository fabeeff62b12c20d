"""Completions that were made elsewhere, as a run of a job: scored like all others, without tokens and without times.

A job that is done is running until it has been finalised again (`db.results.finalise`), as with a policy that is added;
there is nothing to compute, so whoever looks at it next ends it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np
from sqlalchemy import Connection, insert, select, update

from db import events, planning, schema
from db.clock import now
from db.errors import BadInput, Conflict, Missing
from db.events import LOCAL, What
from db.partial import is_partial
from db.queue import NEW_TASK
from db.records import (
    JobState,
    OutcomeRow,
    PlannedBenchmark,
    PlannedPolicy,
    ScoreRow,
    ShardResults,
    TaskState,
    TokenArrays,
)
from db.rollups import insert_rollups, of_results
from db.score_rows import insert_scores
from db.session import Database
from db.tables import benchmark, job, run, sample, task
from db.token_columns import insert_outcomes

#: of a policy that is none of ours
KIND = "imported"
#: what a sample ends with that nobody completed
NOT_THERE = "there was no completion for this sample among those that were imported"

_NO_TOKENS = TokenArrays(
    *(np.empty(0, dtype) for dtype in (np.int32, np.int16, np.int16, np.int16, np.float32)),  # type: ignore[arg-type]
)


@dataclass(frozen=True)
class Made:
    """What a sample ended with elsewhere; a sample without is an error."""

    text: str
    scores: dict[str, float] = field(default_factory=dict)  #: by metric


#: by benchmark (the record's number, or its place in a job that is new): what its samples ended with, by position
Completed = Mapping[int, Mapping[int, Made]]


def imported_policy(label: str, source: dict[str, Any]) -> PlannedPolicy:
    """source: where the completions come from, as the record keeps it."""
    return PlannedPolicy(label, KIND, {KIND: source})


def add_completions(
    db: Database,
    job_id: int,
    policy: PlannedPolicy,
    completed: Completed,
    versions: dict[str, str],
    *,
    who: str = LOCAL,
) -> None:
    """Give a job that is done one more run on each benchmark of `completed`. versions: of the metrics in it.

    Raises `Missing`, and `Conflict` where the job is not done or has a run of that name.
    """
    with db.write() as connection:
        schema.hold(connection)
        found = connection.execute(select(job).where(job.c.id == job_id).with_for_update()).one_or_none()
        if found is None or is_partial(found):
            raise Missing(f"job {job_id} does not exist; `shortstop list` shows those that do.")
        if found.state != JobState.DONE:
            raise Conflict(f"job {job_id} is {found.state}; completions can be imported into a job that is done.")
        runs = connection.execute(select(run).where(run.c.job_id == job_id).order_by(run.c.position)).all()
        if policy.label in {one.policy for one in runs}:
            raise Conflict(f"job {job_id} has a run {policy.label!r} already; give the new one another name.")
        tasks, added = [], 0
        for benchmark_id in dict.fromkeys(one.benchmark_id for one in runs):
            earlier = [one for one in runs if one.benchmark_id == benchmark_id]
            if benchmark_id not in completed:
                planning.move_on(connection, earlier, added)
                continue
            run_id = planning.add_run(connection, earlier, added, policy)
            size = found.pinned["batch_size"]
            made = _Run(connection, job_id, run_id, benchmark_id, size, earlier[-1].score_revision)
            tasks.append(made.write(completed[benchmark_id], versions))
            added += 1
        again = {"state": JobState.RUNNING, "finished_at": None, "paused": False}
        connection.execute(update(job).where(job.c.id == job_id).values(again))
        # what `db.cancelling` needs to take it back
        before = {"label": policy.label, "first_task": min(tasks), "finished_at": found.finished_at}
        events.record(connection, job_id, who, What.COMPLETIONS_IMPORTED, **policy.spec[KIND], **before)


def new_job(
    db: Database,
    name: str,
    pinned: dict[str, Any],
    benchmarks: Sequence[PlannedBenchmark],
    policy: PlannedPolicy,
    completed: Completed,
    versions: dict[str, str],
    *,
    who: str = LOCAL,
) -> int:
    """A job of nothing but completions that were made elsewhere. Returns its number; it is to be finalised.

    pinned: must hold `batch_size`. completed: by place among `benchmarks`. Raises `BadInput` as `jobs.plan_job` does.
    """
    planning.check(benchmarks, [policy])
    fields = {"name": name, "spec": {"name": name, **policy.spec}, "state": JobState.RUNNING, "priority": 0}
    fields |= {"pinned": pinned, "created_at": now(), "started_at": now(), "principal": who}
    with db.write() as connection:
        schema.hold(connection)
        job_id: int = connection.execute(insert(job).values(fields).returning(job.c.id)).scalar_one()
        ids = planning.keep_benchmarks(connection, benchmarks)
        planning.add_runs(connection, job_id, benchmarks, ids, [policy])
        for place, planned in enumerate(benchmarks):
            benchmark_id = ids[planned.content_hash]
            its_run = select(run.c.id).where(run.c.job_id == job_id, run.c.benchmark_id == benchmark_id)
            run_id = connection.execute(its_run).scalar_one()
            made = _Run(connection, job_id, run_id, benchmark_id, pinned["batch_size"], 1)
            made.write(completed.get(place, {}), versions)
        events.record(connection, job_id, who, What.SUBMITTED, **policy.spec[KIND], label=policy.label)
    return job_id


@dataclass(frozen=True)
class _Run:
    """A run on its way into the record."""

    connection: Connection
    job_id: int
    run_id: int
    benchmark_id: int
    batch_size: int
    revision: int  #: of scores

    def write(self, made: Mapping[int, Made], versions: dict[str, str]) -> int:
        """An outcome for every sample, in one shard that is done. Returns the shard's id."""
        in_order = select(sample.c.position, sample.c.id).where(sample.c.benchmark_id == self.benchmark_id)
        samples = self.connection.execute(in_order.order_by(sample.c.position)).all()
        if unknown := made.keys() - {position for position, _ in samples}:
            raise BadInput(f"benchmark {self.benchmark_id} has no sample at position {min(unknown)}; leave it out.")
        task_id = self._shard()
        outcomes = [self._outcome(id, made.get(position)) for position, id in samples]
        ids = dict(samples)
        scores = [
            ScoreRow(self.run_id, ids[position], metric, versions[metric], value)
            for position, one in made.items()
            for metric, value in one.scores.items()
        ]
        insert_outcomes(self.connection, task_id, outcomes)
        insert_scores(self.connection, scores, {self.run_id: self.revision})
        insert_rollups(self.connection, task_id, of_results(ShardResults(outcomes, scores)))
        return task_id

    def _shard(self) -> int:
        size = select(benchmark.c.n_samples).where(benchmark.c.id == self.benchmark_id)
        batches = ceil(self.connection.execute(size).scalar_one() / self.batch_size)
        fields = NEW_TASK | {"job_id": self.job_id, "kind": "shard", "priority": 0, "state": TaskState.DONE}
        fields |= {"benchmark_id": self.benchmark_id, "end_batch": batches, "done_batches": batches}
        fields |= {"epoch": 1, "attempt": 1, "worker": KIND}
        id: int = self.connection.execute(insert(task).values(fields).returning(task.c.id)).scalar_one()
        return id

    def _outcome(self, sample_id: int, made: Made | None) -> OutcomeRow:
        return OutcomeRow(
            run_id=self.run_id,
            sample_id=sample_id,
            text=None if made is None else made.text,
            error=NOT_THERE if made is None else None,
            finish=None,
            n_tokens=0,
            prompt_tokens=0,
            cut_tokens=0,
            shown=made is not None,
            tokens=None if made is None else _NO_TOKENS,
        )
