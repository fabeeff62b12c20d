"""Samples by how their completions differ: the ones that a person wants to look at."""

from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import ColumnElement, and_, exists, or_, select

from db.errors import Missing
from db.jobs import runs_of
from db.readings import Place, completions
from db.records import CompletionRow, RunRow, SampleRow
from db.session import Database
from db.tables import outcome, run, sample, score

#: positions that one look goes through: a rare kind in a large benchmark takes several
LOOKED_AT = 20_000

_SAMPLE = [sample.c[name] for name in SampleRow.__dataclass_fields__]


class Kind(StrEnum):
    """What sets a sample apart."""

    DIFFER = "differ"  #: a policy wrote another text than full depth
    WRONGLY_STOPPED = "wrongly-stopped"  #: a policy gave up where full depth got accepted
    ONLY_FULL = "only-full"  #: accepted at full depth, and under none of the policies that have ended
    ERRORS = "errors"  #: ended with an error


@dataclass(frozen=True)
class Ended:
    """What one sample ended with under one policy, in short."""

    run_id: int
    text: str | None
    error: str | None
    finish: str | None


@dataclass(frozen=True)
class Compared:
    """One sample with all that it ended with so far."""

    sample: SampleRow
    ended: list[Ended]  #: in the order of the runs


@dataclass(frozen=True)
class ComparedPage:
    """Some of the samples of one benchmark, in its order."""

    samples: list[Compared]
    next: int | None  #: the position that the next look begins with; None at the end
    looked_to: int  #: one past the last position that was looked at


def compared(
    db: Database,
    full: RunRow | None,
    others: list[RunRow],
    n_samples: int,
    *,
    kind: Kind | None = None,
    start: int = 0,
    limit: int = 50,
) -> ComparedPage:
    """Samples from position `start` on that are of this kind under any of `others`, which are on one benchmark.

    full: the run at full depth; without it nothing is ever of a kind but `ERRORS`.
    """
    runs = ([] if full is None else [full]) + others
    end = min(start + LOOKED_AT, n_samples)
    chosen = select(*_SAMPLE).where(
        sample.c.benchmark_id == runs[0].benchmark_id,
        sample.c.position >= start,
        sample.c.position < end,
        *_conditions(full, others, kind),
    )
    with db.read() as connection:
        rows = [SampleRow(*row) for row in connection.execute(chosen.order_by(sample.c.position).limit(limit + 1))]
        ids = [row.id for row in rows[:limit]]
        columns = (outcome.c.sample_id, outcome.c.run_id, outcome.c.text, outcome.c.error, outcome.c.finish)
        asked = select(*columns).where(outcome.c.run_id.in_([one.id for one in runs]), outcome.c.sample_id.in_(ids))
        ended = {(sample_id, of.run_id): of for sample_id, *rest in connection.execute(asked) for of in [Ended(*rest)]}
    samples = [
        Compared(row, [ended[row.id, one.id] for one in runs if (row.id, one.id) in ended]) for row in rows[:limit]
    ]
    if len(rows) > limit:
        return ComparedPage(samples, rows[limit].position, rows[limit].position)
    return ComparedPage(samples, end if end < n_samples else None, end)


def _conditions(full: RunRow | None, others: list[RunRow], kind: Kind | None) -> list[ColumnElement[bool]]:
    if kind is None:
        return []
    theirs = outcome.alias("theirs")
    ids = [one.id for one in others]
    is_theirs = (theirs.c.sample_id == sample.c.id, theirs.c.run_id.in_(ids))
    if kind is Kind.ERRORS:
        mine = theirs.c.run_id.in_(ids if full is None else [full.id, *ids])
        return [exists().where(theirs.c.sample_id == sample.c.id, mine, theirs.c.error.is_not(None))]
    of_full = outcome.alias("of_full")
    is_full = (of_full.c.sample_id == sample.c.id, of_full.c.run_id == (-1 if full is None else full.id))
    if kind is Kind.DIFFER:
        return [exists().where(*is_theirs, *is_full, theirs.c.text != of_full.c.text)]
    accepted_at_full = _accepted([-1 if full is None else full.id], "score_full")
    if kind is Kind.WRONGLY_STOPPED:
        return [accepted_at_full, exists().where(*is_theirs, theirs.c.finish == "stop")]
    return [accepted_at_full, exists().where(*is_theirs), ~_accepted(ids, "score_theirs")]


def _accepted(run_ids: list[int], name: str) -> ColumnElement[bool]:
    """Whether the sample's completion under any of these runs counts as accepted, by the scores in force."""
    scored = score.alias(name)
    its = run.alias(f"{name}_run")
    return exists().where(
        scored.c.run_id.in_(run_ids),
        its.c.id == scored.c.run_id,
        scored.c.revision == its.c.score_revision,
        scored.c.sample_id == sample.c.id,
        scored.c.metric == "accepted",
        scored.c.value == 1.0,
    )


@dataclass(frozen=True)
class Neighbours:
    """The samples before and behind one in its benchmark."""

    before: int | None
    behind: int | None


def sample_under_all(
    db: Database, job_id: int, sample_id: int
) -> tuple[list[tuple[RunRow, CompletionRow | None]], Neighbours]:
    """Every run of the job on the sample's benchmark, with what the sample ended with: None where it has not.

    Raises `Missing` where the job has no such sample.
    """
    with db.read() as connection:
        its = select(sample.c.benchmark_id, sample.c.position).where(sample.c.id == sample_id)
        at = connection.execute(its).one_or_none()
        runs = [] if at is None else [one for one in runs_of(connection, job_id) if one.benchmark_id == at.benchmark_id]
        if at is None or not runs:
            raise Missing(f"job {job_id} has no sample {sample_id}; see the list of its completions.")
        around = select(sample.c.position, sample.c.id).where(
            sample.c.benchmark_id == at.benchmark_id,
            or_(sample.c.position == at.position - 1, sample.c.position == at.position + 1),
        )
        by_position = {row.position: row.id for row in connection.execute(around)}
        ended_under = set(
            connection.execute(
                select(outcome.c.run_id).where(
                    and_(outcome.c.sample_id == sample_id, outcome.c.run_id.in_([one.id for one in runs]))
                )
            ).scalars()
        )
    before = by_position.get(at.position - 1)
    found = []
    for one in runs:
        after = None if before is None else Place(one.id, before)
        row = next(completions(db, run_id=one.id, limit=1, after=after)) if one.id in ended_under else None
        found.append((one, row))
    return found, Neighbours(before, by_position.get(at.position + 1))
