"""`make bench-stats`: how often comparisons and gates err where the truth is known. No figure is asserted.

What is simulated is drawn from a real job of the real model (kept in build/bench/stats.db): scores of whole source
groups, their two sides swapped at random, so that nothing changed in truth. BENCH_SAMPLES (480), BENCH_DRAWS (10,000),
BENCH_PAIRS (100) and BENCH_COMPLETION (24 tokens, where speeds are compared) in the environment make it shorter.
"""

import math
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, kstest

from cluster import jobs
from cluster.comparing.build import compare
from cluster.comparing.model import Changed, Comparison, Difference, Floor, PairComparison, Side
from cluster.comparing.noise import floors
from cluster.comparing.quality import quality_of
from cluster.comparing.sides import Asked
from cluster.comparing.speeds import speed_of
from cluster.comparing.wanted import Wanted
from cluster.gates import Gate, Outcome, Rule, decide, judge
from cluster.reports.model import Estimate
from cluster.spec import parse_job
from cluster.unchanged import done_before
from db.jobs import benchmark as benchmark_of
from db.jobs import runs as runs_of
from db.pairs import FullDepth, PairedBatches, paired_batches, paired_outcomes, scores_of
from db.session import Database, open_database
from tests.bench import postgresql
from tests.bench.big_pairs import compared_in_a_process
from tests.bench.measure import Row, printed, write
from workers.differences import Clusters, log_speed, noise_floor

SAMPLES = int(os.environ.get("BENCH_SAMPLES", 480))
DRAWS = int(os.environ.get("BENCH_DRAWS", 10_000))
PAIRS = int(os.environ.get("BENCH_PAIRS", 100))
TOKENS = int(os.environ.get("BENCH_COMPLETION", 24))
RECORD = Path("build/bench/stats.db")
METRIC = "rouge_l"
#: the default margin and confidence; no loss is allowed
NO_LOSS = Gate(rules=[Rule(metric=METRIC, max_loss=0.0)])
NO_SLOWDOWN = Gate(rules=[Rule(metric="speedup_token", max_loss=0.0)])
MODEL = {"model": "smollm2-135m", "exits": "smollm2-135m"}
#: the two of them are as near to one another as one night's exits are to the next's
OBSERVED = {
    **MODEL,
    "name": "observed",
    "generation": {"max_new_tokens": 10, "batch_size": 8},
    "benchmarks": [{"benchmark": "humaneval-lines", "samples": SAMPLES}],
    "policies": ["full", {"confidence": {"threshold": 0.95}}, {"confidence": {"threshold": 0.9}}],
}
#: run again and again: policies of which each is a pair
TIMED = {
    **MODEL,
    "name": "the same again",
    "generation": {"max_new_tokens": TOKENS, "batch_size": 4},
    "benchmarks": [{"benchmark": "humaneval-lines", "samples": 48}],
    "policies": ["full", *({"confidence": {"threshold": one}} for one in (0.6, 0.8, 0.9, 0.95))],
}

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Observed:
    """Scores of the samples of each source group under two policies."""

    groups: list[tuple[Numbers, Numbers]]

    @property
    def paired_deviation(self) -> float:
        """Standard deviation of the difference of a sample."""
        return float(np.concatenate([b - a for a, b in self.groups]).std(ddof=1))


def done(db: Database, fields: dict[str, Any]) -> int:
    """A finished job of this spec: the one that is there, where nothing changed since."""
    spec = parse_job(fields)
    job_id = done_before(db, spec, Path.cwd())
    return work_off(db, fields) if job_id is None else job_id


def work_off(db: Database, fields: dict[str, Any]) -> int:
    job_id = jobs.submit(db, parse_job(fields))
    assert jobs.work(db, job_id, inline=True) is jobs.JobState.DONE
    return job_id


def observed(db: Database) -> Observed:
    """Of the two dynamic policies of the real job."""
    _, a, b = runs_of(db, done(db, OBSERVED))
    scores_a, scores_b = scores_of(db, a)[METRIC], scores_of(db, b)[METRIC]
    by_group: dict[str, list[int]] = {}
    for row in paired_outcomes(db, a, b):
        by_group.setdefault(row.source_group, []).append(row.position)
    return Observed([(scores_a[places], scores_b[places]) for places in by_group.values()])


# --- drawing ----------------------------------------------------------------------------------------------------------


def drawn(of: Observed, rng: np.random.Generator, groups: int, size: int | None) -> list[tuple[Numbers, Numbers]]:
    """Groups as they were observed, their sides swapped at random: in truth nothing changed.

    size: samples of each, put together from as many observed groups as it takes; None: as they are.
    """
    found = []
    for _ in range(groups):
        a, b = _one(of, rng)
        while size is not None and len(a) < size:
            more_a, more_b = _one(of, rng)
            a, b = np.concatenate([a, more_a]), np.concatenate([b, more_b])
        a, b = a[:size], b[:size]
        found.append((b, a) if rng.random() < 0.5 else (a, b))
    return found


def _one(of: Observed, rng: np.random.Generator) -> tuple[Numbers, Numbers]:
    return of.groups[rng.integers(len(of.groups))]


def difference(groups: list[tuple[Numbers, Numbers]], confidence: float) -> Difference:
    """What a comparison says of them."""
    names = np.repeat([f"{i}" for i in range(len(groups))], [len(a) for a, _ in groups]).astype(object)
    a, b = (np.concatenate([pair[side] for pair in groups]) for side in (0, 1))
    return quality_of(METRIC, "1", Clusters(names), a, b, Wanted(confidence, None, (), None))


def verdict(one: Difference, gate: Gate) -> Outcome:
    """What the gate says of one difference. one: at the gate's confidence."""
    nothing: dict[str, Any] = {"content_hash": "", "benchmark_id": 1, "job_a": 1, "job_b": 2, "run_a": 1, "run_b": 2}
    agreement = {"exact": None, "tokens": None, "diverging": 0, "median_divergence": None, "first_divergence": {}}
    pair = PairComparison(
        benchmark="drawn", policy_a="a", policy_b="b", same_spec=False, samples=one.units, unpaired=0, errors_a=0,
        errors_b=0, agreement=agreement, differences=[one], levels={}, flips=[], moved=[], moved_metric=None, notes=[],
        **nothing,
    )  # fmt: skip
    sides = [Side(asked=name, job_id=at, name=name, finished_at=None) for at, name in enumerate("ab", 1)]
    changed: list[Changed] = []
    comparison = Comparison(a=sides[0], b=sides[1], confidence=gate.two_sided, pairs=[pair], changed=changed, notes=[])
    return decide(gate, comparison).outcome


def null_draw(of: Observed, groups: int, seed: int) -> tuple[bool, float, bool]:
    """Whether the interval covers 0, the p-value, and whether the gate fails: each where nothing changed."""
    rng = np.random.default_rng([seed, groups])
    pairs = drawn(of, rng, groups, None)
    one = difference(pairs, 0.95)
    assert one.p_value is not None
    assert one.p_worse is not None
    failed = False
    if one.p_worse <= 1 - NO_LOSS.confidence:  # above it no gate fails, whatever its interval
        failed = verdict(difference(pairs, NO_LOSS.two_sided), NO_LOSS) is Outcome.FAIL
    return _covers(one.change, 0.0), one.p_value, failed


def skewed_draw(of: Observed, groups: int, seed: int) -> bool:
    """Whether the interval covers what is true of groups as they were observed, skewed and none of them swapped."""
    rng = np.random.default_rng([seed, groups, 1])
    truth = float(np.concatenate([b - a for a, b in of.groups]).mean())
    return _covers(difference([_one(of, rng) for _ in range(groups)], 0.95).change, truth)


def lossy_draw(of: Observed, seed: int) -> tuple[bool, bool]:
    """Whether a true loss of 2 % on 1,000 samples in 100 groups is found, and whether the gate fails."""
    pairs = [(a, 0.98 * b) for a, b in drawn(of, np.random.default_rng([seed, 2]), 100, 10)]
    one = difference(pairs, 0.95)
    found = one.change.high is not None and one.change.high < 0
    return found, verdict(difference(pairs, NO_LOSS.two_sided), NO_LOSS) is Outcome.FAIL


def _covers(estimate: Estimate, truth: float) -> bool:
    return estimate.low is not None and estimate.high is not None and estimate.low <= truth <= estimate.high


# --- rows -------------------------------------------------------------------------------------------------------------


def share(name: str, hits: int, n: int, at_least: float | None = None, at_most: float | None = None) -> Row:
    """In percent, with its exact interval."""
    ends = binomtest(hits, n).proportion_ci(0.95)
    return Row(name, 100 * hits / n, 100 * ends.low, 100 * ends.high, "%", at_least, at_most)


def quality(of: Observed, pool: ProcessPoolExecutor) -> Iterator[Row]:
    """Intervals, p-values and gates where nothing changed, then where something did."""
    deviation = of.paired_deviation
    yield Row(f"paired standard deviation of {METRIC}, {len(of.groups)} groups", deviation, deviation, deviation, "")
    draws = list(pool.map(partial(null_draw, of, 100), range(DRAWS), chunksize=20))
    covered, p_values, failed = zip(*draws, strict=True)
    yield share("no change, 100 groups: gate fails", sum(failed), DRAWS, at_most=1)
    yield share("no change, 100 groups: 95 % interval covers", sum(covered), DRAWS, at_least=93, at_most=97)
    yield share("no change: p at most 0.05", sum(p <= 0.05 for p in p_values), DRAWS, at_most=5)
    yield share("no change: p at most 0.01", sum(p <= 0.01 for p in p_values), DRAWS, at_most=1)
    super_uniform = kstest(p_values, "uniform", alternative="greater")
    # of 1 in 100 tests with p-values that are uniform the statistic is larger
    largest = math.sqrt(math.log(100) / (2 * DRAWS))
    yield Row(
        "no change: most that p-values are too small by", *[float(super_uniform.statistic)] * 3, "", at_most=largest
    )
    fewer = DRAWS // 5
    covered = list(pool.map(partial(skewed_draw, of, 100), range(fewer), chunksize=20))
    yield share("skewed as observed, 100 groups: 95 % interval covers", sum(covered), fewer, 93, 97)
    larger = list(pool.map(partial(null_draw, of, 400), range(fewer), chunksize=20))
    yield share("no change, 400 groups: 95 % interval covers", sum(one[0] for one in larger), fewer, 93, 97)
    found, failed = zip(*pool.map(partial(lossy_draw, of), range(fewer), chunksize=20), strict=True)
    yield share("true loss of 2 %, 1,000 samples, 100 groups: found", sum(found), fewer, at_least=80)
    yield share("true loss of 2 %, 1,000 samples, 100 groups: gate fails", sum(failed), fewer)


def same_again(db: Database, pool: ProcessPoolExecutor) -> Iterator[Row]:
    """Jobs of one spec, pairwise: quality does not differ, speed hardly ever alarms, and a true slowdown does."""
    per_job = len(TIMED["policies"])  # type: ignore[arg-type]
    pairs = -(-PAIRS // per_job)
    ids = [work_off(db, TIMED) for _ in range(2 * pairs)]
    same = alarms = slow = 0
    spreads, timed = [], list[PairedBatches]()
    for a, b in zip(ids[::2], ids[1::2], strict=True):
        compare(db, Asked(a), Asked(b), metrics=["speedup_token"])  # each run is in the pair that it was made for
    for a, b in zip(ids[::2], ids[1::2], strict=True):
        found = compare(db, Asked(a), Asked(b), metrics=["es", METRIC])
        same += sum(pair.agreement.diverging == 0 for pair in found.pairs)
        alarms += len(judge(db, NO_SLOWDOWN, Asked(a), Asked(b)).failed)
        for one, other in zip(runs_of(db, a), runs_of(db, b), strict=True):
            batches = paired_batches(db, one, other, TIMED["generation"]["batch_size"])  # type: ignore[index]
            known = floors(db, benchmark_of(db, one.benchmark_id).content_hash, one, other)
            floor = known.of("speedup_token", str(batches.device_class[0]), paced=batches.full is not None)
            slow += is_found(batches, floor)
            spreads.append(100 * (floor.share or 0.0))
            timed += [batches] if batches.full is not None else []
    n = pairs * per_job
    yield share(f"{n} pairs of one spec: the same tokens", same, n, at_least=100)
    yield share(f"{n} pairs of one spec: speed alarms", alarms, n, at_most=1)
    low, value, high = np.percentile(spreads, [2.5, 50, 97.5])
    yield Row("noise floor of a speed, median", float(value), float(low), float(high), "%")
    yield share(f"true slowdown of 5 %, {TIMED['benchmarks'][0]['samples']} samples: gate fails", slow, n)  # type: ignore[index]
    yield from spread(timed)
    for k in (2, 5):
        yield from differ([put_together(one) for one in in_a_row(db, ids, k)], f", {k} jobs in a row as one")
    draws = max(1, DRAWS // 20)
    whole = put_together(timed)
    found = list(pool.map(partial(slow_draw, whole, 1.05), range(draws), chunksize=4))
    yield share("true slowdown of 5 %, 1,000 samples in 250 batches: gate fails", sum(found), draws, at_least=90)
    found = list(pool.map(partial(slow_draw, whole, 1.0), range(draws), chunksize=4))
    yield share("no slowdown, 1,000 samples in 250 batches: gate fails", sum(found), draws, at_most=1)


def spread(timed: list[PairedBatches]) -> Iterator[Row]:
    """By how much pairs of one spec differ, and how much of it single batches explain, which more of them take away."""
    yield from differ(timed)
    everything = [np.ones(len(one), bool) for one in timed]
    alone = [
        log_speed(*(column[:, None] for column in one.per_token(of)), axis=-1)
        for one, of in zip(timed, everything, strict=True)
    ]
    explained = np.array([one.std(ddof=1) / math.sqrt(len(one)) for one in alone])
    yield root_mean_square("as far as single batches explain it", explained)


def differ(timed: list[PairedBatches], what: str = "") -> Iterator[Row]:
    """By the clock and against full depth."""
    for name, columns in (
        ("by the clock", [one.by_the_clock.per_token(np.ones(len(one), bool)) for one in timed]),
        ("against full depth", [one.per_token(np.ones(len(one), bool)) for one in timed]),
    ):
        values = np.array([log_speed(*one, axis=-1) for one in columns])
        yield root_mean_square(f"root mean square of {len(timed)} pairs{what}, {name}", values)


def root_mean_square(name: str, values: Numbers) -> Row:
    """In percent, with its bootstrap interval."""
    drawn = np.random.default_rng(0).choice(values, (2_000, len(values)))
    low, high = np.percentile(np.sqrt((drawn**2).mean(1)), [2.5, 97.5])
    return Row(name, *(100 * float(one) for one in (np.sqrt((values**2).mean()), low, high)), "%")


def in_a_row(db: Database, ids: list[int], k: int) -> Iterator[list[PairedBatches]]:
    """Each policy's batches of k jobs in a row beside those of the next k: one pair of jobs of k times the samples."""
    for first in range(0, len(ids) - 2 * k + 1, 2 * k):
        runs = [(runs_of(db, ids[at]), runs_of(db, ids[at + k])) for at in range(first, first + k)]
        for place in range(1, len(TIMED["policies"])):  # type: ignore[arg-type]
            size = TIMED["generation"]["batch_size"]  # type: ignore[index]
            yield [paired_batches(db, a[place], b[place], size) for a, b in runs]


def put_together(timed: list[PairedBatches]) -> PairedBatches:
    """All batches of all pairs, each in a source group of its own."""
    names = [name for name in PairedBatches.__dataclass_fields__ if name != "full"]
    columns = {name: np.concatenate([getattr(one, name) for one in timed]) for name in names}
    known = [one.full for one in timed if one.full is not None]
    full = FullDepth(
        np.concatenate([one.timed for one in known]),
        *(np.hstack([getattr(one, name) for one in known]) for name in ("prefill", "decode", "tokens")),
    )
    return PairedBatches(**columns, full=full)


def slow_draw(whole: PairedBatches, factor: float, seed: int) -> bool:
    """Whether a slowdown of a policy is found between two jobs of 250 batches, 20 pairs of one spec being known.

    Batches are drawn from all pairs, their sides swapped at random: what whole jobs have in common and full depth does
    not take out is not in it.
    """
    rng = np.random.default_rng([seed, 3])

    def job() -> PairedBatches:
        at, swapped = rng.integers(0, len(whole), 250), rng.random(250) < 0.5
        a, b = np.where(swapped, "b", "a"), np.where(swapped, "a", "b")
        assert whole.full is not None
        side, times = swapped.astype(int), (whole.full.prefill, whole.full.decode, whole.full.tokens)
        return PairedBatches(
            device_class=whole.device_class[at],
            source_group=np.array([str(place) for place in range(250)], object),
            full=FullDepth(whole.full.timed[at], *(np.stack([one[side, at], one[1 - side, at]]) for one in times)),
            **{
                f"{name}_{to}": np.where(of == "a", getattr(whole, f"{name}_a")[at], getattr(whole, f"{name}_b")[at])
                for name in ("prefill", "decode", "tokens")
                for to, of in (("a", a), ("b", b))
            },
        )

    everything = np.ones(250, bool)
    known = [float(log_speed(*job().per_token(everything), axis=-1)) for _ in range(20)]
    return is_found(job(), Floor(pairs=len(known), share=noise_floor(known)), factor)


def is_found(batches: PairedBatches, floor: Floor, factor: float = 1.05) -> bool:
    """Whether the gate fails where every step of B's batches had taken longer, full depth's had not."""
    batches = replace(batches, decode_b=(batches.decode_b * factor).astype(np.int64))
    speed = speed_of(
        "speedup_token", str(batches.device_class[0]), batches, Wanted(NO_SLOWDOWN.two_sided, None, (), None)
    )
    return verdict(speed.model_copy(update={"floor": floor}), NO_SLOWDOWN) is Outcome.FAIL


def everything() -> Iterator[Row]:
    """Every row of the table, in its order."""
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    db = open_database(f"sqlite:///{RECORD}")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        of = observed(db)
        yield from quality(of, pool)
        yield from same_again(db, pool)
    db.close()
    with postgresql.server() as server:
        yield from compared_in_a_process(server)


def main() -> None:
    """Print the table and write it to build/bench/stats.json."""
    print(
        f"{SAMPLES} samples observed, {DRAWS} draws, {PAIRS} pairs of at most {TOKENS} tokens; "
        f"load before: {os.getloadavg()[0]:.2f}"
    )
    write("stats", printed(everything()))


if __name__ == "__main__":
    sys.exit(main())
