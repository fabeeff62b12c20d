"""Reading an export back: looked through first, then written in one transaction."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import Connection, insert, select

from db import schema
from db.checks import Hashes, check_job
from db.clock import now
from db.errors import BadInput
from db.exchange import DECISIONS, EXITS, SCHEMAS, batches, damaged, read_manifest, rows
from db.jobs import runs_of
from db.queue import NEW_TASK
from db.records import OutcomeRow, SampleRow, ScoreRow, TokenArrays
from db.recount import recount
from db.score_rows import insert_scores
from db.session import Database
from db.tables import (
    artifact,
    benchmark,
    benchmark_name,
    insert_new,
    job,
    job_event,
    job_kernels,
    rollup,
    run,
    sample,
    task,
    timing,
)
from db.token_columns import insert_outcomes

#: whom an imported job belongs to; its key is the export's id
PRINCIPAL = "import"
#: rows written at once
_ROWS = 2_000
#: scores are written anew, as the first ones
_REVISION = 1

_OUTCOME = ("text", "error", "finish", "n_tokens", "prompt_tokens", "cut_tokens", "shown", "isolated")
_TASK = ("kind", "state", "first_batch", "end_batch", "done_batches", "epoch", "attempt", "deaths", "worker", "error")


@dataclass(frozen=True)
class Imported:
    """What became of an export."""

    job_id: int
    new: bool  #: False: it had been imported before, and nothing was written


def import_job(db: Database, folder: Path, hashes: Hashes) -> Imported:
    """Write the job of an export into this record, unless it is there.

    Raises `BadInput`, and nothing is written, where the export is damaged, does not keep what a record promises
    (`db.checks`), or has another benchmark under a name and version that this record knows.
    """
    id, content = read_manifest(folder)
    with db.write() as connection:
        schema.hold(connection)
        fields = content["job"] | {"principal": PRINCIPAL, "idempotency_key": id, "body_hash": id}
        is_new = insert_new(connection, job, fields)
        by_key = select(job.c.id).where(job.c.principal == PRINCIPAL, job.c.idempotency_key == id)
        job_id: int = connection.execute(by_key).scalar_one()
        if is_new:
            try:
                _Import(connection, folder, content, job_id).write(hashes)
            except (KeyError, IndexError, TypeError, ValueError, pa.ArrowException) as error:
                if isinstance(error, BadInput):
                    raise
                raise _inconsistent(folder, f"{type(error).__name__}: {error}") from error
            detail = {"export": id, "principal": content["job"]["principal"]}
            event = {"job_id": job_id, "at": now(), "who": PRINCIPAL, "what": "imported", "detail": detail}
            connection.execute(insert(job_event).values(event))
    return Imported(job_id, is_new)


class _Import:
    """One import: places in the export, and the keys that they got here."""

    def __init__(self, connection: Connection, folder: Path, content: dict[str, Any], job_id: int) -> None:
        self.connection = connection
        self.folder = folder
        self.content = content
        self.job_id = job_id
        self.benchmarks: list[int] = []  #: by place
        self.samples: list[list[int]] = []  #: by place of the benchmark, then by position
        self.tasks: list[int] = []
        self.runs: list[int] = []
        self.samples_of_run: list[list[int]] = []

    def write(self, hashes: Hashes) -> None:
        self._artifacts(hashes)
        self._benchmarks(hashes)
        self._tasks()
        self._runs()
        self._outcomes()
        self._scores()
        self._timings()
        self._rollups()
        for name, kernels in self.content["kernels"].items():
            row = {"job_id": self.job_id, "device_class": name, "kernels": kernels}
            self.connection.execute(insert(job_kernels).values(row))
        for violation in check_job(self.connection, self.job_id):
            raise _inconsistent(self.folder, violation)

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
            by_hash = select(benchmark.c.id).where(benchmark.c.content_hash == fields["content_hash"])
            id: int = self.connection.execute(by_hash).scalar_one()
            samples = _kept(self.connection, id, place, own) if is_new else (_sample(place, row) for row in own)
            if hashes.benchmark(fields["version"], fields["ends_with_line"], samples) != fields["content_hash"]:
                raise damaged(self.folder, "samples.parquet")
            in_order = select(sample.c.id).where(sample.c.benchmark_id == id).order_by(sample.c.position)
            self.benchmarks.append(id)
            self.samples.append(list(self.connection.execute(in_order).scalars()))

    def _tasks(self) -> None:
        names = SCHEMAS["tasks"].names
        for values in rows(self.folder, "tasks"):
            found = dict(zip(names, values, strict=True))
            row = NEW_TASK | {name: found[name] for name in _TASK} | {"job_id": self.job_id}
            row |= {
                "priority": self.content["job"]["priority"],
                "benchmark_id": None if found["benchmark"] is None else self.benchmarks[found["benchmark"]],
                "parent_id": None if found["parent"] is None else self.tasks[found["parent"]],
            }
            self.tasks.append(self.connection.execute(insert(task).values(row).returning(task.c.id)).scalar_one())

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
            self.runs.append(self.connection.execute(insert(run).values(row).returning(run.c.id)).scalar_one())
            self.samples_of_run.append(self.samples[of])

    def _outcomes(self) -> None:
        """Completions and tokens come in the same order."""
        tokens = _Tokens(batches(self.folder, "tokens"))
        for piece in _pieces(rows(self.folder, "completions")):
            for place, of_task in groupby(piece, lambda row: row[2]):
                outcomes = [self._outcome(row, tokens) for row in of_task]
                insert_outcomes(self.connection, self.tasks[place], outcomes)
        if tokens.left():
            raise damaged(self.folder, "tokens.parquet")

    def _outcome(self, row: Sequence[Any], tokens: "_Tokens") -> OutcomeRow:
        place, position, _, *values = row
        fields = dict(zip(_OUTCOME, values, strict=True))
        arrays = None
        if fields["error"] is None:
            arrays = tokens.take(place, position, fields["n_tokens"] + (fields["finish"] == "stop"))
        sample_id = self.samples_of_run[place][position]
        return OutcomeRow(run_id=self.runs[place], sample_id=sample_id, tokens=arrays, **fields)

    def _scores(self) -> None:
        revisions = dict.fromkeys(self.runs, _REVISION)
        for piece in _pieces(rows(self.folder, "scores")):
            scores = [
                ScoreRow(self.runs[place], self.samples_of_run[place][position], metric, version, value)
                for place, position, metric, version, value in piece
            ]
            insert_scores(self.connection, scores, revisions)

    def _timings(self) -> None:
        names = SCHEMAS["timings"].names[1:]
        for piece in _pieces(rows(self.folder, "timings")):
            values = [{"run_id": self.runs[row[0]]} | dict(zip(names, row[1:], strict=True)) for row in piece]
            self.connection.execute(insert(timing), values)

    def _rollups(self) -> None:
        for one in runs_of(self.connection, self.job_id):
            counted = ({"run_id": one.id, "task_id": s.task_id} | vars(s.sums) for s in recount(self.connection, one))
            for piece in _pieces(counted):
                self.connection.execute(insert(rollup), piece)


class _Tokens:
    """The file's tokens, taken completion by completion."""

    def __init__(self, pieces: Iterator[pa.RecordBatch]) -> None:
        self._pieces = pieces
        self._columns: dict[str, npt.NDArray[Any]] = {}
        self._at = self._end = 0

    def take(self, run: int, sample: int, n: int) -> TokenArrays:
        """The next n, which must be those of this run and sample. Raises `ValueError`."""
        while self._end - self._at < n and self._more():
            pass
        own = {name: column[self._at : self._at + n] for name, column in self._columns.items()}
        self._at += n
        if n and not (len(own["run"]) == n and (own["run"] == run).all() and (own["sample"] == sample).all()):
            raise ValueError(f"sample {sample} of run {run} has other tokens than it counts")
        if not n:
            own = {name: np.empty(0, np.int16) for name in ("token_id", "exit_layer", "layers_run", "drafts")}
            own |= {"decision": np.empty(0, np.int16), "confidence": np.empty(0, np.float32)}
        return TokenArrays(
            token_ids=own["token_id"].astype(np.int32),
            exit_layers=own["exit_layer"],
            layers_run=own["layers_run"],
            decisions=own["decision"],
            confidences=own["confidence"],
            drafts=own["drafts"],
        )

    def left(self) -> bool:
        """Whether there are more than were taken."""
        return self._at < self._end or self._more()

    def _more(self) -> bool:
        piece = next(self._pieces, None)
        if piece is None:
            return False
        found = _numpy(piece)
        if self._columns:
            found = {name: np.concatenate([self._columns[name][self._at :], found[name]]) for name in found}
        self._columns, self._at, self._end = found, 0, len(found["run"])
        return True


def _numpy(piece: pa.RecordBatch) -> dict[str, npt.NDArray[Any]]:
    def column(name: str, absent: Any) -> npt.NDArray[Any]:
        return pc.fill_null(piece.column(name), absent).to_numpy(zero_copy_only=False)

    decisions = pc.index_in(piece.column("decision"), value_set=pa.array(DECISIONS))
    kept, layers = column("draft_kept", True), column("draft_layer", 0)
    return {
        **{name: column(name, -1) for name in ("run", "sample", "token_id", "exit_layer", "layers_run")},
        "confidence": column("confidence", np.nan),
        "decision": decisions.to_numpy(zero_copy_only=False).astype(np.int16),
        "drafts": np.where(kept, layers, -layers).astype(np.int16),
    }


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
