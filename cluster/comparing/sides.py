"""What is to be compared: a job, one policy of a job, or a run; and which of its runs belong together."""

import re
from dataclasses import dataclass

from cluster.comparing.model import Side
from db import jobs
from db.pairs import run_of
from db.records import JobRow, JobState, RunRow
from db.session import Database
from engine.errors import BadInput
from engine.registry import unknown

_JOB = re.compile(r"(\d{1,18})(?::(.+))?", re.DOTALL)
_RUN = re.compile(r"run:(\d{1,18})")


@dataclass(frozen=True)
class Asked:
    """A side as somebody asks for it: a run, or a job and perhaps one of its policies."""

    job_id: int | None
    policy: str | None = None  #: a label, or a kind that only one policy of the job is of
    run_id: int | None = None

    def __str__(self) -> str:
        if self.run_id is not None:
            return f"run:{self.run_id}"
        return f"{self.job_id}" if self.policy is None else f"{self.job_id}:{self.policy}"


@dataclass(frozen=True)
class Resolved:
    """A side as the record has it."""

    asked: Asked
    job: JobRow
    runs: list[RunRow]
    is_whole: bool  #: all policies of the job

    @property
    def side(self) -> Side:
        return Side(asked=str(self.asked), job_id=self.job.id, name=self.job.name, finished_at=self.job.finished_at)


@dataclass(frozen=True)
class Matched:
    """Runs that belong together, and why others do not."""

    pairs: list[tuple[RunRow, RunRow]]
    notes: list[str]


def parse_side(text: str) -> Asked:
    """`12` is a job, `12:full` its policy of that label or kind, `run:34` a run. Raises `BadInput`."""
    if run := _RUN.fullmatch(text):
        return Asked(None, run_id=int(run[1]))
    if job := _JOB.fullmatch(text):
        return Asked(int(job[1]), job[2])
    raise BadInput(f"side {text!r} is no job; give one like 12, a policy of it like 12:full, or a run like run:34.")


def resolve(db: Database, asked: Asked) -> Resolved:
    """Raises `Missing`, and `BadInput` for a job that is not done and for a policy that it does not have."""
    job_id = asked.job_id if asked.run_id is None else run_of(db, asked.run_id).job_id
    assert job_id is not None
    job, runs = jobs.job(db, job_id), jobs.runs(db, job_id)
    if job.state is not JobState.DONE:
        raise BadInput(f"job {job_id} is {job.state}; only a job that is done can be compared.")
    if asked.run_id is not None:
        runs = [one for one in runs if one.id == asked.run_id]
    elif asked.policy is not None:
        runs = _of_policy(job_id, runs, asked.policy)
    return Resolved(asked, job, runs, asked.run_id is None and asked.policy is None)


def _of_policy(job_id: int, runs: list[RunRow], policy: str) -> list[RunRow]:
    labels = {one.policy for one in runs if policy in (one.policy, one.policy_kind)}
    if policy in labels:
        labels = {policy}
    if not labels:
        raise BadInput(f"job {job_id}: {unknown('policy', policy, list(dict.fromkeys(one.policy for one in runs)))}")
    if len(labels) > 1:
        raise BadInput(f"job {job_id} has several policies {policy!r}; give one of {', '.join(sorted(labels))}.")
    return [one for one in runs if one.policy in labels]


def against_full(job: Resolved) -> Matched:
    """Every policy of a job with `full` on the same benchmark."""
    full = {one.benchmark_id: one for one in job.runs if one.policy_kind == "full"}
    pairs = [(full[one.benchmark_id], one) for one in job.runs if one.policy_kind != "full"]
    if not pairs:
        raise BadInput(f"job {job.job.id} has no policy but full; name a second job to hold it against.")
    return Matched(pairs, [])


def matched(a: Resolved, b: Resolved) -> Matched:
    """Runs on the same benchmark, and under the same policy where both sides have several.

    Raises `BadInput` where the same benchmark has other content, and where nothing belongs together.
    """
    _check_content(a, b)
    pairs, notes = [], []
    by_policy = a.is_whole and b.is_whole
    for one in a.runs:
        for other in b.runs:
            same_policy = not by_policy or one.policy == other.policy
            if one.benchmark_id == other.benchmark_id and same_policy and one.id != other.id:
                pairs.append((one, other))
    for side, other_side in ((a, b), (b, a)):
        paired = {one.id for pair in pairs for one in pair}
        alone = [one for one in side.runs if one.id not in paired]
        for benchmark in dict.fromkeys(one.benchmark for one in alone):
            policies = ", ".join(one.policy for one in alone if one.benchmark == benchmark)
            notes.append(
                f"Left out, for job {other_side.job.id} has nothing to hold it against: {policies} on {benchmark}, "
                f"job {side.job.id}."
            )
    if not pairs:
        raise BadInput(_nothing_shared(a, b))
    return Matched(pairs, notes)


def _check_content(a: Resolved, b: Resolved) -> None:
    ids = {one.benchmark: one.benchmark_id for one in a.runs}
    for other in b.runs:
        if ids.get(other.benchmark, other.benchmark_id) != other.benchmark_id:
            first, second = (_hash(side.job, other.benchmark) for side in (a, b))
            raise BadInput(
                f"benchmark {other.benchmark!r} has other samples in job {a.job.id} (hash {first}) than in job "
                f"{b.job.id} (hash {second}); compare jobs on the same samples."
            )


def _hash(job: JobRow, benchmark: str) -> str:
    return str((job.pinned or {}).get("benchmarks", {}).get(benchmark, "unknown"))[:12]


def _nothing_shared(a: Resolved, b: Resolved) -> str:
    if {one.id for one in a.runs} & {one.id for one in b.runs}:
        return f"{str(a.asked)!r} and {str(b.asked)!r} are the same run; name two jobs, or two policies of one."
    if {one.benchmark_id for one in a.runs} & {one.benchmark_id for one in b.runs}:
        mine, theirs = (", ".join(dict.fromkeys(one.policy for one in side.runs)) for side in (a, b))
        return (
            f"jobs {a.job.id} ({mine}) and {b.job.id} ({theirs}) share no policy; name one of each, like "
            f"{a.job.id}:{a.runs[0].policy_kind} {b.job.id}:{b.runs[0].policy_kind}."
        )
    return f"jobs {a.job.id} and {b.job.id} share no benchmark; compare jobs on the same samples."
