"""Labels: whether judges accept the texts that policies offered for a sample, whichever policies those were.

A label belongs to a job, a sample of it, a text and a judge. So a text that several policies wrote is judged once, and
that of a policy which is added later is judged already where another one wrote the same.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from sqlalchemy import Connection, Row, and_, insert, select, tuple_, update

from db import events, schema
from db.clock import now
from db.errors import Conflict, Missing
from db.events import LOCAL, What
from db.partial import is_partial
from db.records import JobState
from db.session import Database
from db.tables import benchmark, job, label, outcome, run, sample, score

#: samples whose texts are read in one transaction
_WINDOW = 500


@dataclass(frozen=True)
class SamplePlace:
    """A sample of a job's benchmarks."""

    sample_id: int
    content_hash: str  #: of its benchmark
    position: int  #: in its benchmark, from 0


@dataclass(frozen=True)
class Offered:
    """A text that at least one policy of a job offered for a sample."""

    sample_id: int
    prompt: str
    language: str
    text: str


@dataclass(frozen=True)
class Label:
    """Whether a judge accepts a text."""

    sample_id: int
    text: str
    accepted: bool


@dataclass(frozen=True)
class Kept:
    """What became of a judge's labels."""

    new: int
    changed: int  #: the judge had said otherwise before
    unchanged: int


@dataclass(frozen=True)
class Judged:
    """A completion that was offered, and that somebody has judged."""

    run_id: int
    sample_id: int
    source_group: str
    accepted: float  #: share of its judges who accept it
    proxy: float | None  #: its score `accepted` in force


@dataclass(frozen=True)
class Rating:
    """What one judge said of one text."""

    benchmark_id: int
    item: tuple[int, str]  #: sample, hash of the text
    judge: str
    accepted: bool


def hash_of(text: str) -> str:
    """SHA-256 (hex) of a text, by which labels know it."""
    return hashlib.sha256(text.encode()).hexdigest()


def samples_of_job(db: Database, job_id: int) -> list[SamplePlace]:
    """The samples of a job that has ended, by benchmark and position. Raises `Missing`, `Conflict`."""
    with db.read() as connection:
        state = _state(connection, job_id)
        if not state.ended:
            raise Conflict(f"job {job_id} is {state}; export what there is to judge once it has ended.")
        ids = select(run.c.benchmark_id).where(run.c.job_id == job_id)
        chosen = (
            select(sample.c.id, benchmark.c.content_hash, sample.c.position)
            .join_from(sample, benchmark)
            .where(benchmark.c.id.in_(ids))
            .order_by(benchmark.c.id, sample.c.position)
        )
        return [SamplePlace(*row) for row in connection.execute(chosen)]


def offered(db: Database, job_id: int, sample_ids: Collection[int]) -> Iterator[Offered]:
    """Every text once that a policy of the job offered for one of these samples, in the samples' order."""
    ordered = list(dict.fromkeys(sample_ids))
    for first in range(0, len(ordered), _WINDOW):
        window = ordered[first : first + _WINDOW]
        chosen = (
            select(outcome.c.sample_id, sample.c.prompt, sample.c.language, outcome.c.text)
            .join_from(outcome, sample)
            .where(
                outcome.c.run_id.in_(select(run.c.id).where(run.c.job_id == job_id)),
                outcome.c.sample_id.in_(window),
                outcome.c.shown,
                outcome.c.text.is_not(None),
            )
        )
        with db.read() as connection:
            found = dict.fromkeys(Offered(*row) for row in connection.execute(chosen))
        place = {sample_id: at for at, sample_id in enumerate(window)}
        yield from sorted(found, key=lambda one: (place[one.sample_id], one.text))


def keep_labels(db: Database, job_id: int, judge: str, labels: Iterable[Label], *, who: str = LOCAL) -> Kept:
    """Write what a judge said, in the place of what the judge said of the same texts before; all of it or nothing.

    The texts are those that `offered` gives. Raises `Missing`.
    """
    asked = {(one.sample_id, hash_of(one.text)): one for one in labels}
    with db.write() as connection:
        schema.hold(connection)
        _state(connection, job_id, hold=True)
        said = select(label.c.sample_id, label.c.text_hash, label.c.accepted)
        before = {
            (sample_id, text_hash): bool(accepted)
            for sample_id, text_hash, accepted in connection.execute(
                said.where(label.c.job_id == job_id, label.c.judge == judge)
            )
        }
        new = [key for key in asked if key not in before]
        changed = [key for key, one in asked.items() if key in before and before[key] != one.accepted]
        if new:
            connection.execute(insert(label).values(at=now()), [_row(job_id, judge, key, asked[key]) for key in new])
        for accepted in (True, False):
            keys = [key for key in changed if asked[key].accepted is accepted]
            for first in range(0, len(keys), _WINDOW):
                which = tuple_(label.c.sample_id, label.c.text_hash).in_(keys[first : first + _WINDOW])
                change = update(label).where(label.c.job_id == job_id, label.c.judge == judge, which)
                connection.execute(change.values(accepted=accepted, at=now()))
        if new or changed:
            events.record(connection, job_id, who, What.LABELLED, judge=judge, new=len(new), changed=len(changed))
    return Kept(len(new), len(changed), len(asked) - len(new) - len(changed))


def judged(db: Database, job_id: int) -> list[Judged]:
    """The completions of a job that were offered and judged, by run and sample."""
    its_text = and_(
        outcome.c.run_id == run.c.id, outcome.c.sample_id == label.c.sample_id, outcome.c.text == label.c.text
    )
    its_score = and_(
        score.c.run_id == run.c.id,
        score.c.revision == run.c.score_revision,
        score.c.sample_id == label.c.sample_id,
        score.c.metric == "accepted",
    )
    columns = [run.c.id.label("run_id"), label.c.sample_id, sample.c.source_group, label.c.accepted, score.c.value]
    chosen = (
        select(*columns)
        .select_from(label)
        .join(run, run.c.job_id == label.c.job_id)
        .join(outcome, its_text)
        .join(sample, sample.c.id == label.c.sample_id)
        .join(score, its_score, isouter=True)
        .where(label.c.job_id == job_id, outcome.c.shown)
        .order_by(run.c.id, label.c.sample_id)
    )
    with db.read() as connection:
        rows = connection.execute(chosen).all()
    return [_judged(list(group)) for _, group in groupby(rows, key=lambda row: (row.run_id, row.sample_id))]


def ratings(db: Database, job_id: int) -> list[Rating]:
    """All that was said of a job's texts, once for each text, whatever number of policies wrote it."""
    chosen = (
        select(sample.c.benchmark_id, label.c.sample_id, label.c.text_hash, label.c.judge, label.c.accepted)
        .join_from(label, sample)
        .where(label.c.job_id == job_id)
        .order_by(label.c.sample_id, label.c.text_hash, label.c.judge)
    )
    with db.read() as connection:
        return [
            Rating(of, (sample_id, text_hash), judge, bool(accepted))
            for of, sample_id, text_hash, judge, accepted in connection.execute(chosen)
        ]


def _judged(rows: list[Row[Any]]) -> Judged:
    """rows: one a judge."""
    first = rows[0]
    share = sum(bool(row.accepted) for row in rows) / len(rows)
    return Judged(first.run_id, first.sample_id, first.source_group, share, first.value)


def _row(job_id: int, judge: str, key: tuple[int, str], one: Label) -> dict[str, Any]:
    sample_id, text_hash = key
    return {
        "job_id": job_id,
        "sample_id": sample_id,
        "text_hash": text_hash,
        "judge": judge,
        "text": one.text,
        "accepted": one.accepted,
    }


def _state(connection: Connection, job_id: int, *, hold: bool = False) -> JobState:
    """Of a job that is whole. hold: until the transaction ends nobody removes it, or labels it. Raises `Missing`."""
    chosen = select(job.c.state, job.c.error).where(job.c.id == job_id)
    row = connection.execute(chosen.with_for_update(key_share=True) if hold else chosen).one_or_none()
    if row is None or is_partial(row):
        raise Missing(f"job {job_id} does not exist; `shortstop list` shows those that do.")
    return JobState(row.state)
