"""Shards as a worker hands them in, made up: real code for texts, random tokens, the product's own metrics."""

import argparse
import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from db import jobs, queue, results
from db.records import OutcomeRow, RunRow, SampleRow, ScoreRow, ShardResults, TimingRow, TokenArrays
from db.session import Database
from tests.made import N_LAYERS, planned_job
from workers.scoring.metrics import metrics, wanted_metrics

#: tokens of a completion
TOKENS = 32
#: characters of a token of code
CHARACTERS = 3
POLICIES = ("full", "confidence threshold=0.9", "sec exit=0.9 stop=0.7", "random")
CODE = inspect.getsource(argparse)


@dataclass(frozen=True)
class Shape:
    """How a job is cut: samples in a batch, batches in a shard."""

    batch: int
    batches: int

    @property
    def samples(self) -> int:
        return self.batch * self.batches

    @property
    def tokens(self) -> int:
        """Of a shard under all policies."""
        return self.samples * len(POLICIES) * TOKENS


class Work:
    """A job on a record, and what a worker would hand in for one shard after the other."""

    def __init__(self, db: Database, shape: Shape, shards: int) -> None:
        self.db, self.shape = db, shape
        self.job_id = planned_job(
            db, shards * shape.samples, batch_size=shape.batch, shard_batches=shape.batches, policies=POLICIES
        )
        self.runs = jobs.runs(db, self.job_id)
        self._next = 0

    def made(self) -> ShardResults:
        """Of the next shard."""
        first = self._next * self.shape.samples
        samples = results.samples_of(self.db, self.runs[0].benchmark_id, first, first + self.shape.samples)
        batches = range(self._next * self.shape.batches, (self._next + 1) * self.shape.batches)
        self._next += 1
        return made(self.runs, samples, batches, self.shape.batch)

    def commit(self, shard: ShardResults) -> None:
        """What a worker does around its evaluation: claim, and hand in. Shards come in the order they were made in."""
        lease = queue.claim(self.db, "worker", kind="shard", job_id=self.job_id)
        assert lease is not None
        results.commit_shard(self.db, lease, shard)


def made(runs: Sequence[RunRow], samples: Sequence[SampleRow], batches: range, rows: int) -> ShardResults:
    """One shard, every completion `TOKENS` long."""
    rng = np.random.default_rng(batches.start)
    names = wanted_metrics(None)
    shard = ShardResults()
    for run in runs:
        for sample, tokens in zip(samples, _arrays(rng, len(samples), run.policy_kind == "full"), strict=True):
            at = int(rng.integers(len(CODE) - TOKENS * CHARACTERS))
            text = CODE[at : at + TOKENS * CHARACTERS]
            shard.outcomes.append(OutcomeRow(run.id, sample.id, text, None, "length", TOKENS, 256, 0, True, tokens))
            values = rng.random(len(names)).tolist()
            shard.scores.extend(
                ScoreRow(run.id, sample.id, name, metrics[name].version, value)
                for name, value in zip(names, values, strict=True)
            )
        shard.timings.extend(
            TimingRow(run.id, batch, rows, *rng.integers(1, 10**12, 5).tolist(), "cpu-bench", True) for batch in batches
        )
    return shard


def _arrays(rng: np.random.Generator, n: int, full: bool) -> list[TokenArrays]:
    """Of n completions."""
    shape = (n, TOKENS)
    exits = np.full(shape, N_LAYERS) if full else rng.choice([12, 18, 24, N_LAYERS], shape)
    columns = (
        rng.integers(0, 49_152, shape).astype(np.int32),
        exits.astype(np.int16),
        exits.astype(np.int16),
        (exits < N_LAYERS).astype(np.int16),
        rng.beta(2, 0.5, shape).astype(np.float32),
        np.zeros(shape, np.int16),
    )
    return [TokenArrays(*(column[row].copy() for column in columns)) for row in range(n)]
