"""Jobs and results made up for tests of the record: no model, random tokens, every count consistent."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from db import jobs, queue, results
from db.queue import Lease
from db.records import (
    OutcomeRow,
    PlannedBenchmark,
    PlannedPolicy,
    RunRow,
    SampleRow,
    ScoreRow,
    ShardResults,
    TimingRow,
    TokenArrays,
)
from db.session import Database

N_LAYERS = 30


def planned_benchmark(n_samples: int, name: str = "lines", content: str = "one") -> PlannedBenchmark:
    samples = [(f"s/{i}", f"prompt {i:06} é", f"reference {i}", "python", f"group/{i // 3}") for i in range(n_samples)]
    return PlannedBenchmark(name, "1", f"{name}-{content}-{n_samples}", "line", samples, ("file x was empty.",))


def planned_policy(label: str) -> PlannedPolicy:
    return PlannedPolicy(label, label.split()[0], {label.split()[0]: {}})


def planned_job(
    db: Database,
    n_samples: int = 11,
    *,
    batch_size: int = 2,
    shard_batches: int = 2,
    policies: Sequence[str] = ("full", "confidence threshold=0.9"),
    benchmarks: Sequence[str] = ("lines",),
    priority: int = 0,
) -> int:
    """A job whose shards are ready."""
    job_id = jobs.create_job(db, name="made", spec={"model": "none"}, priority=priority)
    lease = queue.claim(db, "preparer", kind="prepare", job_id=job_id)
    assert lease is not None
    jobs.plan_job(
        db,
        lease,
        pinned={"batch_size": batch_size, "shard_batches": shard_batches, "n_layers": N_LAYERS},
        benchmarks=[planned_benchmark(n_samples, name) for name in benchmarks],
        artifacts=[("exits", "hash-of-exits", b"\x00exits")],
        policies=[planned_policy(label) for label in policies],
    )
    return job_id


def claimed(db: Database, worker: str = "worker", **options: object) -> Lease:
    lease = queue.claim(db, worker, kind="shard", **options)  # type: ignore[arg-type]
    assert lease is not None
    return lease


def token_arrays(rng: np.random.Generator, n: int, *, stop: bool, drafting: bool = False) -> TokenArrays:
    """n tokens, and behind them the stop; under a policy that drafts some were drafts, kept or not."""
    total = n + stop
    decisions = rng.integers(0, 2, total).astype(np.int16)
    token_ids = rng.integers(0, 49_152, total).astype(np.int32)
    if stop:
        decisions[-1], token_ids[-1] = 2, -1
    exit_layers = np.where(decisions == 0, N_LAYERS, rng.integers(1, N_LAYERS, total)).astype(np.int16)
    layers_run = np.maximum(exit_layers, rng.integers(1, N_LAYERS + 1, total)).astype(np.int16)
    made = TokenArrays(token_ids, exit_layers, layers_run, decisions, rng.random(total, dtype=np.float32))
    return replace(made, drafts=_drafts(rng, decisions)) if drafting else made


def _drafts(rng: np.random.Generator, decisions: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    layers = rng.choice([0, 18, -18, 24], len(decisions))
    return np.where(decisions == 2, 0, layers).astype(np.int16)


def outcome(
    rng: np.random.Generator, run_id: int, sample_id: int, max_tokens: int = 10, *, drafting: bool = False
) -> OutcomeRow:
    """A completion, or once in ten an error."""
    if rng.random() < 0.1:
        return OutcomeRow(run_id, sample_id, None, "it broke", None, 0, 7, 0, False, None)
    stop = bool(rng.random() < 0.3)
    n_tokens = int(rng.integers(0 if stop else 1, max_tokens + 1))
    return OutcomeRow(
        run_id=run_id,
        sample_id=sample_id,
        text=f"text of {sample_id}\t\\N é",
        error=None,
        finish="stop" if stop else "length",
        n_tokens=n_tokens,
        prompt_tokens=int(rng.integers(1, 100)),
        cut_tokens=int(rng.integers(0, 2)),
        shown=not stop,
        tokens=token_arrays(rng, n_tokens, stop=stop, drafting=drafting),
    )


def results_of(
    db: Database, lease: Lease, *, seed: int = 0, end_batch: int | None = None, tokens: int = 10
) -> ShardResults:
    """What a worker would commit for the batches of the lease before `end_batch`."""
    assert lease.benchmark_id is not None
    pinned = jobs.job(db, lease.job_id).pinned
    assert pinned is not None
    rng = np.random.default_rng([seed, lease.first_batch, lease.benchmark_id])
    size, end = pinned["batch_size"], end_batch or lease.end_batch
    samples = results.samples_of(db, lease.benchmark_id, lease.first_batch * size, end * size)
    made = ShardResults()
    for run in jobs.runs(db, lease.job_id):
        if run.benchmark_id != lease.benchmark_id:
            continue
        for sample in samples:
            made.outcomes.append(outcome(rng, run.id, sample.id, tokens, drafting=_drafting(run)))
            made.scores.extend(_scores(rng, run.id, sample))
        for batch in range(lease.first_batch, end):
            rows = min(size, samples[-1].position + 1 - batch * size)
            figures = (int(n) for n in rng.integers(1, 10**12, 5))
            timing = TimingRow(run.id, batch, rows, *figures, "cpu-test", bool(rng.random() < 0.8))
            made.timings.append(replace(timing, drafted=7, drafts_kept=3 + batch % 2) if _drafting(run) else timing)
    return made


def _drafting(run: RunRow) -> bool:
    return run.policy_kind == "self-speculative"


def _scores(rng: np.random.Generator, run_id: int, sample: SampleRow) -> list[ScoreRow]:
    return [
        ScoreRow(run_id, sample.id, "es", "es@test-1", float(rng.random())),
        ScoreRow(run_id, sample.id, "em", "em@test-1", float(rng.integers(0, 2))),
    ]


def work(db: Database, worker: str = "worker") -> int:
    """Claim and commit until nothing is ready; how many shards that were."""
    done = 0
    while lease := queue.claim(db, worker, kind="shard"):
        results.commit_shard(db, lease, results_of(db, lease))
        done += 1
    return done


def summarise(data: object) -> dict[str, object]:
    """The least that a summary may be."""
    return {"samples": len(data.sample), "policy": data.policy}  # type: ignore[attr-defined]
