"""Two runs on one benchmark side by side: what they wrote, how it scored, how long it took."""

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sqlalchemy import ColumnElement, Connection, and_, case, func, or_, select

from db.errors import Missing
from db.records import RunRow
from db.session import Database
from db.tables import benchmark, outcome, run, sample, score, timing
from db.token_columns import ids_from, ids_selection

#: rows that are fetched at once
_IN_PIECES = {"yield_per": 5_000}
_TIMES = ("prefill_ns", "decode_ns", "decode_tokens")


class PairedOutcome(NamedTuple):
    """What one sample ended with under both runs."""

    position: int
    sample_id: int
    name: str
    source_group: str
    failed_a: bool | None  #: whether it ended with an error; None: it has not ended
    failed_b: bool | None
    ids_a: list[int] | None  #: token ids, a stop's place left out; None without a completion, and where both are equal
    ids_b: list[int] | None
    is_same: bool  #: both completed it with the same tokens


@dataclass(frozen=True)
class PairedBatches:
    """Batches that both runs timed on the same device class; one place a batch, in order."""

    device_class: npt.NDArray[np.object_]
    source_group: npt.NDArray[np.object_]  #: of the batch's first sample
    prefill_a: npt.NDArray[np.int64]  #: nanoseconds, as the next three
    decode_a: npt.NDArray[np.int64]
    prefill_b: npt.NDArray[np.int64]
    decode_b: npt.NDArray[np.int64]
    tokens_a: npt.NDArray[np.int64]  #: written by decode steps
    tokens_b: npt.NDArray[np.int64]
    #: of either side full depth of its own job: None of two runs that were timed in turns, and of full depth itself
    full: "FullDepth | None" = None

    def __len__(self) -> int:
        return len(self.decode_a)

    @property
    def by_the_clock(self) -> "PairedBatches":
        """The same without full depth."""
        return replace(self, full=None)

    def per_token(self, of: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.int64]]:
        """Decode times and tokens of A, then of B, of some batches: [some] each.

        Where full depth was timed in both jobs for all of these, its times and tokens stand behind either side's own.
        """
        sides = [[self.decode_a, self.tokens_a], [self.decode_b, self.tokens_b]]
        if self.full is not None:
            sides = [[*own, self.full.decode[side], self.full.tokens[side]] for side, own in enumerate(sides)]
        return self._columns(sides, of)

    def per_request(self, of: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.int64]]:
        """The same of prefill and decoding together, by batch."""
        one = np.ones(len(self), np.int64)
        sides = [[self.prefill_a + self.decode_a, one], [self.prefill_b + self.decode_b, one]]
        if self.full is not None:
            sides = [[*own, full, one] for own, full in zip(sides, self.full.prefill + self.full.decode, strict=True)]
        return self._columns(sides, of)

    def _columns(self, sides: list[list[Any]], of: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.int64]]:
        paced = self.full is not None and bool(self.full.timed[of].all()) and self.full.tokens[:, of].sum(axis=1).all()
        return [column[of] for side in sides for column in (side if paced else side[:2])]


@dataclass(frozen=True)
class FullDepth:
    """What full depth of either side's job took for the same batches; 0 where it was not timed in both jobs."""

    timed: npt.NDArray[np.bool_]  #: [batches] in both jobs
    prefill: npt.NDArray[np.int64]  #: [2, batches] nanoseconds, as the next
    decode: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]  #: [2, batches] written by decode steps


@dataclass(frozen=True)
class Written:
    """What was to be written for a sample, and what was."""

    reference: str
    text_a: str | None
    text_b: str | None
    finish_a: str | None
    finish_b: str | None


def run_of(db: Database, run_id: int) -> RunRow:
    """Raises `Missing`."""
    with db.read() as connection:
        chosen = select(*(run.c[name] for name in RunRow.__dataclass_fields__)).where(run.c.id == run_id)
        row = connection.execute(chosen).one_or_none()
    if row is None:
        raise Missing(f"run {run_id} does not exist; `shortstop show JOB --json` lists the runs of a job.")
    return RunRow(*row)


def paired_outcomes(db: Database, a: RunRow, b: RunRow) -> Iterator[PairedOutcome]:
    """Every sample that ended under one of the runs, in the benchmark's order; streamed in one transaction."""
    of_a, of_b = outcome.alias("of_a"), outcome.alias("of_b")
    columns: list[ColumnElement[Any]] = [sample.c.position, sample.c.id, sample.c.name, sample.c.source_group]
    columns += [of_a.c.id, of_b.c.id, of_a.c.error.is_not(None), of_b.c.error.is_not(None)]
    chosen = (
        select(*columns, ids_selection(db.dialect, "of_a"), ids_selection(db.dialect, "of_b"))
        .select_from(sample)
        .outerjoin(of_a, and_(of_a.c.sample_id == sample.c.id, of_a.c.run_id == a.id))
        .outerjoin(of_b, and_(of_b.c.sample_id == sample.c.id, of_b.c.run_id == b.id))
        .where(sample.c.benchmark_id == a.benchmark_id, or_(of_a.c.id.is_not(None), of_b.c.id.is_not(None)))
    )
    with db.read() as connection:
        rows = connection.execute(chosen.order_by(sample.c.position), execution_options=_IN_PIECES)
        for position, sample_id, name, group, id_a, id_b, failed_a, failed_b, kept_a, kept_b in rows:
            is_same = kept_a is not None and kept_a == kept_b
            ids_a = None if is_same else ids_from(db.dialect, kept_a)
            ids_b = None if is_same else ids_from(db.dialect, kept_b)
            yield PairedOutcome(
                position,
                sample_id,
                name,
                group,
                None if id_a is None else bool(failed_a),
                None if id_b is None else bool(failed_b),
                ids_a,
                ids_b,
                is_same or (ids_a is not None and ids_a == ids_b),
            )


def positions_seen(db: Database, benchmark_id: int, job_id: int) -> set[int]:
    """Positions of the samples whose prompt and reference a benchmark of this job has as well."""
    theirs = select(run.c.benchmark_id).where(run.c.job_id == job_id)
    texts = select(sample.c.position, sample.c.prompt, sample.c.reference)
    with db.read() as connection:
        seen_texts = texts.where(sample.c.benchmark_id.in_(theirs))
        seen = {_digest(row) for row in connection.execute(seen_texts, execution_options=_IN_PIECES)}
        mine = connection.execute(texts.where(sample.c.benchmark_id == benchmark_id), execution_options=_IN_PIECES)
        return {row.position for row in mine if _digest(row) in seen}


def written_by(db: Database, run_a: int, run_b: int, sample_ids: Collection[int]) -> dict[int, Written]:
    """By sample, what was asked for and what either run wrote."""
    of_a, of_b = outcome.alias("of_a"), outcome.alias("of_b")
    columns = [sample.c.reference, of_a.c.text, of_b.c.text, of_a.c.finish, of_b.c.finish]
    chosen = (
        select(sample.c.id, *columns)
        .select_from(sample)
        .outerjoin(of_a, and_(of_a.c.sample_id == sample.c.id, of_a.c.run_id == run_a))
        .outerjoin(of_b, and_(of_b.c.sample_id == sample.c.id, of_b.c.run_id == run_b))
        .where(sample.c.id.in_(sample_ids))
    )
    with db.read() as connection:
        return {sample_id: Written(*texts) for sample_id, *texts in connection.execute(chosen)}


def _digest(row: Any) -> bytes:
    return hashlib.blake2b(f"{len(row.prompt)} {row.prompt}{row.reference}".encode(), digest_size=16).digest()


def scores_of(db: Database, one: RunRow) -> dict[str, npt.NDArray[np.float64]]:
    """By metric, the scores in force: one place a sample of the benchmark, nan where it has none."""
    current = (score.c.run_id == one.id, score.c.revision == run.c.score_revision)
    chosen = (
        select(score.c.metric, sample.c.position, score.c.value)
        .join(run, run.c.id == score.c.run_id)
        .join(sample, sample.c.id == score.c.sample_id)
        .where(*current)
    )
    found: dict[str, npt.NDArray[np.float64]] = {}
    with db.read() as connection:
        size = select(benchmark.c.n_samples).where(benchmark.c.id == one.benchmark_id)
        n = int(connection.execute(size).scalar_one())
        for metric, position, value in connection.execute(chosen, execution_options=_IN_PIECES):
            if metric not in found:
                found[metric] = np.full(n, np.nan)
            found[metric][position] = value
    return {metric: found[metric] for metric in sorted(found)}


def paired_batches(db: Database, a: RunRow, b: RunRow, batch_size: int) -> PairedBatches:
    """What both timed, batch by batch; batch_size: that both jobs pin.

    Of a run that was added to its job later, full depth stands beside it (`TimingRow.full_decode_ns`): that time counts
    where `a` is the `full` run of the same job.
    """
    of_a, of_b = timing.alias("of_a"), timing.alias("of_b")
    full_a, full_b = timing.alias("full_a"), timing.alias("full_b")
    first = and_(sample.c.benchmark_id == a.benchmark_id, sample.c.position == of_a.c.batch * batch_size)
    columns: list[ColumnElement[Any]] = [of_a.c.device_class, sample.c.source_group]
    columns += [table.c[name] for table in (of_a, of_b) for name in _TIMES]
    columns += [of_b.c.full_decode_ns]
    for own, full in ((of_a, full_a), (of_b, full_b)):
        added = own.c.full_decode_ns.is_not(None)  # to its job later: prefill and full depth are of that hour
        columns += [case((added, own.c.prefill_ns), else_=full.c.prefill_ns)]
        columns += [func.coalesce(own.c.full_decode_ns, full.c.decode_ns), full.c.decode_tokens, added]
    with db.read() as connection:
        full_runs = [_full_run(connection, one) for one in (a, b)]
        chosen = (
            select(*columns)
            .select_from(of_a)
            .join(of_b, of_b.c.batch == of_a.c.batch)
            .join(sample, first)
            .outerjoin(full_a, _beside(full_a, of_a, full_runs[0]))
            .outerjoin(full_b, _beside(full_b, of_b, full_runs[1]))
            .where(of_a.c.run_id == a.id, of_b.c.run_id == b.id, of_a.c.timed, of_b.c.timed)
            .where(of_a.c.device_class == of_b.c.device_class, of_a.c.rows == of_b.c.rows)
        )
        rows = connection.execute(chosen.order_by(of_a.c.batch)).all()
    beside = a.job_id == b.job_id and a.policy_kind == "full" and bool(rows) and all(row[8] is not None for row in rows)
    in_turns = a.job_id == b.job_id and (beside or not any(row[12] or row[16] for row in rows))
    return PairedBatches(
        device_class=_column(rows, 0, object),
        source_group=_column(rows, 1, object),
        prefill_a=_column(rows, 5 if beside else 2, np.int64),
        decode_a=_column(rows, 8 if beside else 3, np.int64),
        prefill_b=_column(rows, 5, np.int64),
        decode_b=_column(rows, 6, np.int64),
        tokens_a=_column(rows, 4, np.int64),
        tokens_b=_column(rows, 7, np.int64),
        full=None if in_turns or {a.policy_kind, b.policy_kind} == {"full"} else _full_depth(rows),
    )


def _full_run(connection: Connection, one: RunRow) -> int | None:
    """The run of full depth in the same job on the same benchmark."""
    mine = (run.c.job_id == one.job_id, run.c.benchmark_id == one.benchmark_id, run.c.policy_kind == "full")
    return connection.execute(select(run.c.id).where(*mine).order_by(run.c.id)).scalar()


def _beside(full: Any, own: Any, full_run: int | None) -> ColumnElement[bool]:
    """Full depth's timing of the same batch: on the same device class, unless its time was taken again beside."""
    same = and_(full.c.timed, full.c.device_class == own.c.device_class)
    alike = and_(full.c.batch == own.c.batch, full.c.rows == own.c.rows)
    return and_(full.c.run_id == full_run, alike, or_(own.c.full_decode_ns.is_not(None), same))


def _full_depth(rows: Any) -> FullDepth:
    found = [[*row[9:12], *row[13:16]] for row in rows]
    timed = np.array([None not in one for one in found], bool)
    times = np.array([[0] * 6 if None in one else one for one in found], np.int64).reshape(-1, 2, 3)
    return FullDepth(timed, times[..., 0].T, times[..., 1].T, times[..., 2].T)


def _column(rows: Any, place: int, dtype: Any) -> npt.NDArray[Any]:
    return np.array([row[place] for row in rows], dtype)
