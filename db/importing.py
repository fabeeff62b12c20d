"""Reading an export back: looked through first, then written in short transactions, so that others can write meanwhile.

The first one writes the job as one that was cancelled and is being imported, with its runs and tasks; the next ones
what hangs on these, a piece each, and with it how far the import is; the last one makes the job what it was. Whoever is
interrupted goes on when the same export is imported again.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from sqlalchemy import Connection, insert, select, update

from db import events, pruning, schema
from db.checks import Hashes, check_whole
from db.clock import now
from db.errors import BadInput, NewerSchema, OlderSchema
from db.events import What
from db.exchange import EXITS, SCHEMAS, batches, damaged, read_manifest, rows
from db.jobs import runs_of
from db.labels import hash_of
from db.partial import IMPORTED, PRUNED
from db.queue import NEW_TASK
from db.records import JobState, OutcomeRow, SampleRow, ScoreRow, TraceRow
from db.recount import recount, snapshot
from db.score_rows import insert_scores
from db.session import Database
from db.tables import (
    artifact,
    benchmark,
    benchmark_name,
    insert_new,
    job,
    job_kernels,
    label,
    rollup,
    run,
    sample,
    task,
    timing,
)
from db.token_columns import insert_outcomes
from db.token_parquet import TokensOfExport
from db.trace_parquet import exported_traces
from db.traces import insert_traces

#: whom an imported job belongs to; its key is the export's id
PRINCIPAL = "import"
#: rows written in one transaction; of samples and tasks, at once
_ROWS = 1_000
#: scores are written anew, as the first ones
_REVISION = 1

_OUTCOME = ("text", "error", "finish", "n_tokens", "prompt_tokens", "cut_tokens", "shown", "isolated")
_TASK = ("kind", "state", "first_batch", "end_batch", "done_batches", "epoch", "attempt", "deaths", "worker", "error")

#: some rows, and what writes them
_Piece = tuple[int, Callable[[Connection], object]]


@dataclass(frozen=True)
class Imported:
    """What became of an export."""

    job_id: int
    new: bool  #: False: it had been imported before, and nothing was written


def import_job(db: Database, folder: Path, hashes: Hashes) -> Imported:
    """Write the job of an export into this record, unless it is there; go on with one that was interrupted.

    Nobody sees it as a job that has ended well before it is whole. Raises `BadInput`, and nothing stays written, where
    the export is damaged, does not keep what a record promises (`db.checks`), or has another benchmark under a name and
    version that this record knows; `BadInput` too where somebody else imports it at this moment.
    """
    id, content = read_manifest(folder)
    job_id = None
    try:
        with db.write() as connection:
            schema.hold(connection)
            begun, is_new = _begun(connection, content, id)
            if is_new:
                _Plan(connection, folder, content, begun).write(hashes)
        job_id = begun
        return Imported(job_id, _Import(db, folder, content, id, job_id).go_on())
    except (KeyError, IndexError, TypeError, ValueError, pa.ArrowException) as error:
        if job_id is not None and not isinstance(error, _Held | OlderSchema | NewerSchema):
            pruning.withdraw(db, job_id)
        if isinstance(error, BadInput):
            raise
        raise _inconsistent(folder, f"{type(error).__name__}: {error}") from error


class _Held(BadInput):
    """Not this import's any more: what is written of it stays."""


def _begun(connection: Connection, content: dict[str, Any], id: str) -> tuple[int, bool]:
    """The job of the export with this id, written now unless it was before."""
    fields = {name: content["job"][name] for name in ("name", "spec", "pinned", "priority", "created_at")}
    fields |= {"state": JobState.CANCELLED, "error": _progress(0), "finished_at": now()}
    fields |= {"principal": PRINCIPAL, "idempotency_key": id, "body_hash": id}
    is_new = insert_new(connection, job, fields)
    by_key = select(job.c.id).where(job.c.principal == PRINCIPAL, job.c.idempotency_key == id)
    return connection.execute(by_key).scalar_one(), is_new


def _progress(rows: int) -> str:
    """Kept as the error of the job: so many rows, in the order of `_Import._pieces`, are there."""
    return f"{IMPORTED}: {rows} rows are there"


class _Plan:
    """What a prepare task would write: benchmarks, runs and tasks. In one transaction, as there."""

    def __init__(self, connection: Connection, folder: Path, content: dict[str, Any], job_id: int) -> None:
        self.connection = connection
        self.folder = folder
        self.content = content
        self.job_id = job_id
        self.benchmarks: list[int] = []  #: by place

    def write(self, hashes: Hashes) -> None:
        self._artifacts(hashes)
        self._benchmarks(hashes)
        self._tasks()
        self._runs()
        for name, kernels in self.content["kernels"].items():
            row = {"job_id": self.job_id, "device_class": name, "kernels": kernels}
            self.connection.execute(insert(job_kernels).values(row))

    def _artifacts(self, hashes: Hashes) -> None:
        for found in self.content["artifacts"]:
            content = (self.folder / EXITS).read_bytes()
            if hashes.artifact(found["kind"], content) != found["hash"]:
                raise damaged(self.folder, EXITS)
            row = {"hash": found["hash"], "kind": found["kind"], "content": content, "created_at": now()}
            insert_new(self.connection, artifact, row)

    def _benchmarks(self, hashes: Hashes) -> None:
        everything = rows(self.folder, "samples")
        for place, fields in enumerate(self.content["benchmarks"]):
            own = islice(everything, fields["n_samples"])
            is_new = insert_new(self.connection, benchmark, fields)
            id = _benchmark_id(self.connection, fields)
            samples = _kept(self.connection, id, place, own) if is_new else (_sample(place, row) for row in own)
            if hashes.benchmark(fields["version"], fields["ends"], samples) != fields["content_hash"]:
                raise damaged(self.folder, "samples.parquet")
            self.benchmarks.append(id)

    def _tasks(self) -> None:
        names = SCHEMAS["tasks"].names
        found = [dict(zip(names, values, strict=True)) for values in rows(self.folder, "tasks")]
        fixed = NEW_TASK | {"job_id": self.job_id, "priority": self.content["job"]["priority"]}
        for piece in _pieces(found):
            own = [fixed | {name: one[name] for name in _TASK} | self._benchmark_of(one) for one in piece]
            self.connection.execute(insert(task), own)
        ids = _tasks_of(self.connection, self.job_id)
        for place, one in enumerate(found):
            if one["parent"] is not None:
                parent = {"parent_id": ids[one["parent"]]}
                self.connection.execute(update(task).where(task.c.id == ids[place]).values(parent))

    def _benchmark_of(self, found: dict[str, Any]) -> dict[str, int | None]:
        place = found["benchmark"]
        return {"benchmark_id": None if place is None else self.benchmarks[place]}

    def _runs(self) -> None:
        for place, of, name, policy, kind, spec, summary in rows(self.folder, "runs"):
            row = {
                "job_id": self.job_id,
                "position": place,
                "benchmark_id": self.benchmarks[of],
                "benchmark": name,
                "policy": policy,
                "policy_kind": kind,
                "policy_spec": json.loads(spec),
                "score_revision": _REVISION,
                "summary": None if summary is None else json.loads(summary),
            }
            _keep_name(self.connection, name, self.content["benchmarks"][of], self.benchmarks[of])
            self.connection.execute(insert(run).values(row))


class _Import:
    """One import: places in the export, and the keys that they got here."""

    def __init__(self, db: Database, folder: Path, content: dict[str, Any], id: str, job_id: int) -> None:
        self.db = db
        self.folder = folder
        self.content = content
        self.id = id
        self.job_id = job_id
        with db.read() as connection:
            ids = [_benchmark_id(connection, fields) for fields in content["benchmarks"]]
            samples = {id: _samples_of(connection, id) for id in ids}  #: by position
            runs = runs_of(connection, job_id)
            self.tasks = _tasks_of(connection, job_id)
            self._error = connection.execute(select(job.c.error).where(job.c.id == job_id)).scalar_one()
        self.runs = [one.id for one in runs]
        self.samples_of_benchmark = [samples[id] for id in ids]
        self.samples_of_run = [samples[one.benchmark_id] for one in runs]

    def go_on(self) -> bool:
        """Write what is lacking. False: nothing is."""
        if self._error is None or not self._error.startswith(IMPORTED):
            return False
        there, passed = int(self._error.split()[2]), 0
        for n, write in self._pieces():
            if passed >= there:
                self._write(passed, n, write)
            passed += n
        if passed < there:
            raise ValueError(f"{there} rows are there and the export has {passed}")
        self._check()
        self._end(passed)
        return True

    def _write(self, there: int, n: int, write: Callable[[Connection], object]) -> None:
        with self.db.write() as connection:
            self._hold(connection, there)
            write(connection)
            further = {"error": _progress(there + n), "finished_at": now()}
            connection.execute(update(job).where(job.c.id == self.job_id).values(further))

    def _hold(self, connection: Connection, there: int) -> None:
        """See that the import is where this one left it, and let nobody else go on with it in this transaction."""
        schema.hold(connection)
        held = select(job.c.error).where(job.c.id == self.job_id).with_for_update(key_share=True)
        error = connection.execute(held).scalar_one_or_none()
        if error == _progress(there):
            return
        if error is None or not error.startswith(PRUNED):
            raise _Held(f"export {str(self.folder)!r} is being imported by somebody else; wait until that has ended.")
        raise _Held(f"export {str(self.folder)!r} was removed by a prune while it was imported; import it again.")

    def _check(self) -> None:
        with snapshot(self.db) as connection:
            row = connection.execute(select(job).where(job.c.id == self.job_id)).one()
            for violation in check_whole(connection, row, JobState(self.content["job"]["state"])):
                raise _inconsistent(self.folder, violation)

    def _end(self, there: int) -> None:
        with self.db.write() as connection:
            self._hold(connection, there)
            fields = self.content["job"] | {"principal": PRINCIPAL}
            connection.execute(update(job).where(job.c.id == self.job_id).values(fields))
            whose = self.content["job"]["principal"]
            events.record(connection, self.job_id, PRINCIPAL, What.IMPORTED, export=self.id, principal=whose)

    def _pieces(self) -> Iterator[_Piece]:
        """All that is to be written, in one order and cut at the same places each time."""
        yield from self._outcomes()
        yield from self._scores()
        yield from self._timings()
        yield from self._traces()
        yield from self._rollups()
        yield from self._labels()

    def _outcomes(self) -> Iterator[_Piece]:
        """Completions and tokens come in the same order."""
        tokens = TokensOfExport(batches(self.folder, "tokens"))
        for piece in _pieces(rows(self.folder, "completions")):
            outcomes = [(self.tasks[row[2]], self._outcome(row, tokens)) for row in piece]
            yield len(piece), partial(_write_outcomes, outcomes)
        if tokens.left():
            raise damaged(self.folder, "tokens.parquet")

    def _outcome(self, row: Sequence[Any], tokens: TokensOfExport) -> OutcomeRow:
        place, position, _, *values = row
        fields = dict(zip(_OUTCOME, values, strict=True))
        arrays = None
        if fields["error"] is None:
            arrays = tokens.take(place, position, fields["n_tokens"] + (fields["finish"] == "stop"))
        sample_id = self.samples_of_run[place][position]
        return OutcomeRow(run_id=self.runs[place], sample_id=sample_id, tokens=arrays, **fields)

    def _scores(self) -> Iterator[_Piece]:
        revisions = dict.fromkeys(self.runs, _REVISION)
        for piece in _pieces_of_completions(rows(self.folder, "scores")):
            scores = [
                ScoreRow(self.runs[place], self.samples_of_run[place][position], metric, version, value)
                for place, position, metric, version, value in piece
            ]
            yield len(piece), partial(insert_scores, scores=scores, revisions=revisions)

    def _timings(self) -> Iterator[_Piece]:
        names = SCHEMAS["timings"].names[1:]
        for piece in _pieces(rows(self.folder, "timings")):
            values = [{"run_id": self.runs[row[0]]} | dict(zip(names, row[1:], strict=True)) for row in piece]
            yield len(piece), partial(_insert, insert(timing), values)

    def _traces(self) -> Iterator[_Piece]:
        found = (
            TraceRow(self.runs[place], self.samples_of_run[place][position], tokens, key, arrays)
            for place, position, tokens, key, arrays in exported_traces(batches(self.folder, "traces"))
        )
        for piece in _pieces(found):
            yield len(piece), partial(insert_traces, traces=piece)

    def _rollups(self) -> Iterator[_Piece]:
        """Counted from what is there by now."""
        with snapshot(self.db) as connection:
            for one in runs_of(connection, self.job_id):
                counted = ({"run_id": one.id, "task_id": s.task_id} | vars(s.sums) for s in recount(connection, one))
                for piece in _pieces(counted):
                    yield len(piece), partial(_insert, insert(rollup), piece)

    def _labels(self) -> Iterator[_Piece]:
        for piece in _pieces(rows(self.folder, "labels")):
            values = [
                {
                    "job_id": self.job_id,
                    "sample_id": self.samples_of_benchmark[place][position],
                    "text_hash": hash_of(text),
                    "text": text,
                    "judge": judge,
                    "accepted": accepted,
                    "at": at,
                }
                for place, position, text, judge, accepted, at in piece
            ]
            yield len(piece), partial(_insert, insert(label), values)


def _insert(statement: Any, values: list[dict[str, Any]], connection: Connection) -> None:
    connection.execute(statement, values)


def _write_outcomes(outcomes: list[tuple[int, OutcomeRow]], connection: Connection) -> None:
    for task_id, of_task in groupby(outcomes, lambda pair: pair[0]):
        insert_outcomes(connection, task_id, [one for _, one in of_task])


def _benchmark_id(connection: Connection, fields: dict[str, Any]) -> int:
    by_hash = select(benchmark.c.id).where(benchmark.c.content_hash == fields["content_hash"])
    return int(connection.execute(by_hash).scalar_one())


def _samples_of(connection: Connection, benchmark_id: int) -> list[int]:
    in_order = select(sample.c.id).where(sample.c.benchmark_id == benchmark_id).order_by(sample.c.position)
    return list(connection.execute(in_order).scalars())


def _tasks_of(connection: Connection, job_id: int) -> list[int]:
    """In the order in which they were written."""
    return list(connection.execute(select(task.c.id).where(task.c.job_id == job_id).order_by(task.c.id)).scalars())


def _kept(connection: Connection, benchmark_id: int, place: int, own: Iterable[tuple[Any, ...]]) -> Iterator[SampleRow]:
    """Samples on their way to be hashed, written as they pass."""
    for piece in _pieces(own):
        samples = [_sample(place, row) for row in piece]
        values = [{name: value for name, value in vars(one).items() if name != "id"} for one in samples]
        connection.execute(insert(sample), [{"benchmark_id": benchmark_id} | value for value in values])
        yield from samples


def _sample(place: int, row: tuple[Any, ...]) -> SampleRow:
    if row[0] != place:
        raise ValueError(f"benchmark {place} lacks samples")
    return SampleRow(0, *row[1:])


def _keep_name(connection: Connection, name: str, fields: dict[str, Any], benchmark_id: int) -> None:
    """Bind name and version to the content; what they are bound to never changes."""
    key = {"name": name, "version": fields["version"]}
    if insert_new(connection, benchmark_name, key | {"benchmark_id": benchmark_id}):
        return
    bound = select(benchmark_name.c.benchmark_id).filter_by(**key)
    if connection.execute(bound).scalar_one() != benchmark_id:
        raise BadInput(
            f"benchmark {name!r} version {fields['version']!r} has another content in this record than in the export; "
            "import it into another database."
        )


def _inconsistent(folder: Path, complaint: str) -> BadInput:
    return BadInput(f"export {str(folder)!r} is not what a record holds ({complaint.rstrip('.')}); export it again.")


def _pieces(values: Iterable[Any]) -> Iterator[list[Any]]:
    ahead = iter(values)
    while piece := list(islice(ahead, _ROWS)):
        yield piece


def _pieces_of_completions(scores: Iterable[Sequence[Any]]) -> Iterator[list[Sequence[Any]]]:
    """The scores of one completion are written together."""
    piece: list[Sequence[Any]] = []
    for _, of_completion in groupby(scores, key=lambda row: tuple(row[:2])):
        piece.extend(of_completion)
        if len(piece) >= _ROWS:
            yield piece
            piece = []
    if piece:
        yield piece
