"""A trace out of the record: as pieces to replay, and as Arrow."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cluster.spec import TRACE
from db import devices, jobs
from db.errors import BadInput
from db.records import JobState, RunRow, TracedSample
from db.session import Database
from db.traces import source_groups, traced_tokens, traces
from engine.cost import Machine, Shape
from engine.replay.ideal import CostModel
from engine.replay.traced import Traced
from workers.pinned import Pinned

if TYPE_CHECKING:
    import pyarrow as pa

#: tokens of a piece, about: its arrays stay in the processor's cache
_PIECE_TOKENS = 20_000


@dataclass(frozen=True)
class Trace:
    """A trace of one benchmark."""

    db: Database
    run: RunRow
    pinned: Pinned
    groups: tuple[str, ...]  #: names of the source groups, by number

    @property
    def target(self) -> str:
        """`reference`, or `full`: the model's own completion."""
        assert self.pinned.trace is not None
        return self.pinned.trace

    @property
    def points(self) -> tuple[int, ...]:
        """The exit points, full depth last."""
        return tuple(sorted({*self.pinned.exit_points, self.pinned.n_layers}))

    def samples(self, at_once: int = 512) -> Iterator[list[TracedSample]]:
        """In the benchmark's order, some neighbours at a time."""
        return traces(self.db, self.run.id, samples=at_once)

    def pieces(self) -> Iterator[Traced]:
        """What `engine.replay.replay.replay` takes: whole batches, in order."""
        return (piece for piece, _ in self.numbered_pieces())

    def numbered_pieces(self) -> Iterator[tuple[Traced, list[int]]]:
        """The same, each with the positions of its samples in the benchmark."""
        number = {name: place for place, name in enumerate(self.groups)}
        size = self.pinned.batch_size
        batches = max(1, _PIECE_TOKENS // (size * self.pinned.max_new_tokens))
        for samples in self.samples(size * batches):
            yield self._piece(samples, number), [one.position for one in samples]

    def part(self, tokens: int) -> Traced:
        """About so many tokens at the most: whole batches, evenly spread over the benchmark."""
        every = max(1, -(-traced_tokens(self.db, self.run.id) // tokens))
        batches = traces(self.db, self.run.id, samples=self.pinned.batch_size, every=every)
        number = {name: place for place, name in enumerate(self.groups)}
        return self._piece([one for batch in batches for one in batch], number)

    def cost_model(self) -> CostModel | None:
        """None where the record does not know what the job's device class reaches: the job was imported."""
        reaches = devices.known_plan(self.db, self.pinned.device_class)
        if reaches is None or self.pinned.shape is None or self.pinned.heads is None:
            return None
        return CostModel(Shape(**self.pinned.shape), self.pinned.heads, Machine(**reaches))

    def _piece(self, samples: list[TracedSample], number: dict[str, int]) -> Traced:
        arrays = [one.arrays for one in samples]
        columns = {
            name: np.concatenate([getattr(one, name) for one in arrays], axis=-1)
            for name in arrays[0].__dataclass_fields__
        }
        return Traced(
            points=self.points,
            exit_points=self.pinned.exit_points,
            has_controller=self.pinned.controller,
            max_new_tokens=self.pinned.max_new_tokens,
            lengths=np.array([len(one) for one in arrays]),
            groups=np.array([number[one.source_group] for one in samples]),
            batches=np.array([one.position // self.pinned.batch_size for one in samples]),
            prompt_tokens=np.array([one.prompt_tokens for one in samples]),
            prompt_keys=np.array([one.prompt_key for one in samples]),
            **columns,
            after_exit=self.pinned.after_exit,
        )


def traces_of(db: Database, job_id: int, benchmark: str | None = None) -> list[Trace]:
    """The traces of a job, one for each benchmark, or of those that are named: `humaneval-lines` is enough for
    `humaneval-lines samples=160`.

    Raises `Missing`, and `BadInput` where the job is no trace, is not done, or knows no such benchmark.
    """
    job = jobs.job(db, job_id)
    runs = [run for run in jobs.runs(db, job_id) if run.policy_kind == TRACE]
    if job.spec.get("trace") is None and not runs:
        raise BadInput(f"job {job_id} is no trace; make one of the same spec with `shortstop trace SPEC`.")
    if job.state is not JobState.DONE:
        raise BadInput(f"job {job_id} is {job.state}, and a trace can be asked when it is done; wait, or resume it.")
    pinned = Pinned.model_validate(job.pinned)
    chosen = [run for run in runs if benchmark in (None, run.benchmark)]
    chosen = chosen or [run for run in runs if run.benchmark.split(" ")[0] == benchmark]
    if not chosen:
        known = ", ".join(repr(run.benchmark) for run in runs)
        raise BadInput(f"job {job_id} has no trace of benchmark {benchmark!r}; name one of {known}.")
    return [Trace(db, run, pinned, tuple(source_groups(db, run.id))) for run in chosen]


def trace_of(db: Database, job_id: int, benchmark: str | None = None) -> Trace:
    """The trace of a job's only benchmark, or of the one that is named. Raises as `traces_of` does."""
    found = traces_of(db, job_id, benchmark)
    if len(found) > 1:
        known = ", ".join(repr(one.run.benchmark) for one in found)
        raise BadInput(f"job {job_id} has traces of several benchmarks; name one of {known}.")
    return found[0]


def trace_schema() -> "pa.Schema":
    """The columns of a trace: a row a token of a target and exit point, full depth the last one."""
    import pyarrow as pa

    from db.trace_parquet import CELL_FIELDS

    return pa.schema(
        [
            ("run_id", pa.int64()),
            ("benchmark", pa.string()),
            ("sample_id", pa.int64()),
            ("sample", pa.string()),
            ("source_group", pa.string()),
            ("language", pa.string()),
            *CELL_FIELDS,
        ]
    )


def trace_batches(trace: Trace, schema: "pa.Schema") -> "Iterator[pa.RecordBatch]":
    """The rows of a trace in pieces, sample by sample; no transaction is open between two of them."""
    for samples in trace.samples():
        yield _arrow(trace, samples, schema)


def _arrow(trace: Trace, samples: list[TracedSample], schema: "pa.Schema") -> "pa.RecordBatch":
    import pyarrow as pa

    from db.trace_parquet import cells

    counts = np.array([len(one.arrays) * len(trace.points) for one in samples])
    place = pa.array(np.repeat(np.arange(len(samples)), counts))
    of_sample = {
        "run_id": [trace.run.id] * len(samples),
        "benchmark": [trace.run.benchmark] * len(samples),
        "sample_id": [one.sample_id for one in samples],
        "sample": [one.name for one in samples],
        "source_group": [one.source_group for one in samples],
        "language": [one.language for one in samples],
    }
    columns = {name: pa.array(values, schema.field(name).type).take(place) for name, values in of_sample.items()}
    columns |= cells([one.arrays for one in samples], trace.points)
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)
