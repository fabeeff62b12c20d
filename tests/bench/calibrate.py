"""`make bench-calibrate`: how often a promise is broken, with a real trace as the population.

Source groups of a trace are drawn anew a thousand times, a calibration is made on each draw, and what it promises is
held against all groups. It counts as broken where any policy that was promised, chosen or not, is above the bound.

In the environment: BENCH_SAMPLES, each of a source file of its own (400), and BENCH_DRAWS (1000).
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster import jobs
from cluster.calibrate.agreement import along_chains, calibrate_agreement, chains_of, losses_of, wrong_tokens
from cluster.calibrate.quality import in_sequence, live_losses
from cluster.confirming import run_live
from cluster.grids import ReplaySpec, expand
from cluster.settings import Settings
from cluster.spec import parse_job
from cluster.traced import Trace, trace_of
from db.jobs import runs
from db.session import Database, open_database
from engine.replay.traced import Traced
from engine.spec import parse_policy
from tests.bench.measure import Row, printed, write

DRAWS = int(os.environ.get("BENCH_DRAWS", 1_000))
CONFIDENCE = 0.95
#: groups of a draw
GROUPS = 400
SAMPLES = int(os.environ.get("BENCH_SAMPLES", 400))
STEPS = {"from": 0.3, "to": 1.0, "steps": 71}
LIVE = (0.99, 0.95, 0.9, 0.8, 0.7, 0.6)

SPEC: dict[str, Any] = {
    "name": "calibrate",
    "model": "smollm2-135m",
    "exits": "smollm2-135m",
    "trace": "full",
    "generation": {"max_new_tokens": 10, "batch_size": 8},
    # the paper's protocol: prompts are short, so that most of the time goes into what is promised
    "benchmarks": [{"source": "sympy", "task": "random-cut", "samples": SAMPLES, "name": "sympy"}],
}


def population(folder: Path) -> tuple[Database, Trace]:
    """A trace of the real model's own completions."""
    db = open_database(f"sqlite:///{folder / 'record.db'}")
    job_id = jobs.submit(db, parse_job(SPEC))
    jobs.work(db, job_id, inline=True)
    return db, trace_of(db, job_id)


def broken(losses: np.ndarray, promised: Any, bound: float) -> tuple[float, float]:
    """Shares of the draws in which a promise was broken, and in which any was given. losses: [policies, groups]."""
    draw, above = np.random.default_rng(0), losses.mean(1) > bound
    kept = [promised(losses[:, draw.integers(0, losses.shape[1], GROUPS)]) for _ in range(DRAWS)]
    return float(np.mean([any(above[list(one)]) for one in kept])), float(np.mean([len(one) > 0 for one in kept]))


def most_broken() -> float:
    """What is allowed: what was promised, and two standard errors of this measurement."""
    return 1 - CONFIDENCE + 2 * float(np.sqrt(CONFIDENCE * (1 - CONFIDENCE) / DRAWS))


def agreement(trace: Trace) -> Iterator[Row]:
    """Of the real exits' confidence and controller, and of verdicts that are drawn by chance."""
    grid = [{"confidence": {"threshold": STEPS}}, {"controller": {"exit": STEPS, "stop": 1.0}}]
    policies = [one.model_copy(update={"kv": "recompute"}) for one in expand(grid, 1, 1)]
    _, losses = losses_of(trace, policies, wrong_tokens)
    chains = chains_of(policies)
    level = (1 - CONFIDENCE) / len(chains)
    for bound in (0.05, 0.1, 0.2):
        share, given = broken(losses, lambda drawn, bound=bound: along_chains(drawn, chains, bound, level)[1], bound)
        name = f"agreement, at most {bound:g}: promises broken"
        yield Row(name, share, share, share, "of draws", at_most=most_broken())
        yield Row(f"agreement, at most {bound:g}: promises given", given, given, given, "of draws")
    yield from random_controller(trace)


@dataclass(frozen=True)
class RandomController(Trace):
    """The trace with the controller's verdicts in any order: as sure as the real ones, and of nothing."""

    def numbered_pieces(self) -> Iterator[tuple[Traced, list[int]]]:
        for piece, positions in super().numbered_pieces():
            order = np.random.default_rng([1, positions[0]]).permutation(len(piece))
            yield replace(piece, controller=piece.controller[..., order]), positions


def random_controller(trace: Trace) -> Iterator[Row]:
    """What is faster than full depth under it is refused."""
    made_up = RandomController(**vars(trace))
    asked = ReplaySpec(policies=[{"controller": {"exit": STEPS, "stop": 1.0}}])
    found = calibrate_agreement(made_up, asked, max_disagree=0.05, confidence=CONFIDENCE)
    chosen = 0.0 if found.chosen is None else 1.0
    name = "a random controller, agreement, at most 0.05"
    yield Row(f"{name}: policies chosen", chosen, chosen, chosen, "", at_most=0)
    policies = [parse_policy(one.spec) for one in found.tried]
    _, losses = losses_of(made_up, policies, wrong_tokens)
    faster, chains = np.array([one.faster for one in found.tried]), chains_of(policies)

    def promised(drawn: np.ndarray) -> list[int]:
        return [place for place in along_chains(drawn, chains, 0.05, 1 - CONFIDENCE)[1] if faster[place]]

    share, given = broken(losses, promised, 0.05)
    yield Row(f"{name}: promises broken", share, share, share, "of draws", at_most=most_broken())
    yield Row(f"{name}: promises of what is faster", given, given, given, "of draws", at_most=most_broken())


def quality(db: Database, trace: Trace) -> Iterator[Row]:
    """ROUGE-L of completions that were made live."""
    policies = expand([{"confidence": {"threshold": list(LIVE)}}], 1, 1)
    job_id = run_live(db, trace, "calibrate live", policies, ["rouge_l"], Settings(), inline=True)
    by_label = {run.policy: run for run in runs(db, job_id)}
    losses = np.stack([live_losses(db, trace, by_label[one.label], "rouge_l", 1.0).means for one in policies])
    for bound in (0.011, 0.03, 0.05):
        share, given = broken(
            losses, lambda drawn, bound=bound: range(in_sequence(drawn, bound, 1 - CONFIDENCE)[1]), bound
        )
        name = f"rouge_l, at most {bound:g} less: promises broken"
        yield Row(name, share, share, share, "of draws", at_most=most_broken())
        yield Row(f"rouge_l, at most {bound:g} less: promises given", given, given, given, "of draws")


def everything() -> Iterator[Row]:
    """Every row of the table, in its order."""
    with tempfile.TemporaryDirectory() as folder:
        db, trace = population(Path(folder))
        with closing(db):
            yield from agreement(trace)
            yield from quality(db, trace)


def main() -> None:
    """Print the table and write it to build/bench/calibrate.json."""
    write("calibrate", printed(everything()))


if __name__ == "__main__":
    main()
