"""`make bench-calibrate`: how often a promise is broken, with a real trace as the population.

Source groups of a trace are drawn anew a thousand times, a calibration is made on each draw, and what it promises is
held against all groups. It counts as broken where any policy that was promised, chosen or not, is above the bound.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from cluster import jobs
from cluster.calibrate.agreement import along_chains, chains_of, losses_of, wrong_tokens
from cluster.calibrate.quality import in_sequence, live_losses
from cluster.confirming import run_live
from cluster.grids import expand
from cluster.settings import Settings
from cluster.spec import parse_job
from cluster.traced import Trace, trace_of
from db.jobs import runs
from db.session import Database, open_database
from engine.spec import Controller, PolicySpec
from tests.bench.measure import Row, printed, write

DRAWS, CONFIDENCE = 1_000, 0.95
#: groups of a draw
GROUPS = 400
SAMPLES = int(os.environ.get("BENCH_SAMPLES", "400"))
LIVE = (0.99, 0.95, 0.9, 0.8, 0.7, 0.6)

SPEC: dict[str, Any] = {
    "name": "calibrate",
    "model": "smollm2-135m",
    "exits": "smollm2-135m",
    "trace": "full",
    "generation": {"max_new_tokens": 10, "batch_size": 8},
    "benchmarks": [{"source": "sympy", "task": "next-line", "samples": SAMPLES, "name": "sympy"}],
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
    steps = {"from": 0.3, "to": 1.0, "steps": 71}
    grid = [{"confidence": {"threshold": steps}}, {"controller": {"exit": steps, "stop": 1.0}}]
    policies = [one.model_copy(update={"kv": "recompute"}) for one in expand(grid, 1, 1)]
    _, losses = losses_of(trace, policies, wrong_tokens)
    chains = chains_of(policies)
    level = (1 - CONFIDENCE) / len(chains)
    for bound in (0.05, 0.1, 0.2):
        share, given = broken(losses, lambda drawn, bound=bound: along_chains(drawn, chains, bound, level)[1], bound)
        name = f"agreement, at most {bound:g}: promises broken"
        yield Row(name, share, share, share, "of draws", at_most=most_broken())
        yield Row(f"agreement, at most {bound:g}: promises given", given, given, given, "of draws")
    yield from random_controller(trace, policies)


def random_controller(trace: Trace, policies: list[PolicySpec]) -> Iterator[Row]:
    """Verdicts in any order, of the same sureness: whatever leaves early is refused."""
    draw = np.random.default_rng(1)

    def shuffled(policy: PolicySpec, piece: Any) -> np.ndarray:
        from dataclasses import replace

        order = draw.permutation(len(piece))
        return wrong_tokens(policy, replace(piece, controller=piece.controller[..., order]))

    asked = [one for one in policies if isinstance(one, Controller)]
    _, losses = losses_of(trace, asked, shuffled)
    leaves = losses.mean(1) > 0
    chains = chains_of(asked)
    share, _ = broken(losses, lambda drawn: along_chains(drawn, chains, 0.05, 1 - CONFIDENCE)[1], 0.05)
    name = "a random controller, agreement, at most 0.05: promises broken"
    yield Row(name, share, share, share, "of draws", at_most=most_broken())
    kept = along_chains(losses, chains, 0.05, 1 - CONFIDENCE)[1]
    used = sum(bool(leaves[place] and losses[place].mean() > 0.05) for place in kept)
    yield Row("a random controller: policies above the bound that are promised", used, used, used, "", at_most=0)


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


def main() -> None:
    """Print the table and write it to build/bench/calibrate.json."""
    with tempfile.TemporaryDirectory() as folder:
        db, trace = population(Path(folder))
        with closing(db):
            rows = printed(agreement(trace)) + printed(quality(db, trace))
    write("calibrate", rows)


if __name__ == "__main__":
    main()
