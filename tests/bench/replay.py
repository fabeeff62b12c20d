"""`make bench-replay`: a thousand policies over traces of 10,000, 100,000 and a million tokens, out of a record.

Each measurement is a process of its own, so that its peak is its own; times include reading the trace. Then what a
trace of the real model costs, against the cost model and against the same pass and heads without a trace.

In the environment: BENCH_TOKENS of the traces ("10000 100000 1000000"), BENCH_TIMES that each is replayed (3; the
largest with most policies once).
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.grids import ReplaySpec
from cluster.replays import replay_trace
from cluster.traced import trace_of
from db import devices, jobs, queue
from db.records import JobState, PlannedBenchmark, PlannedPolicy, TraceArrays, TraceRow
from db.session import Database, open_database
from db.traces import insert_traces
from engine.engine import Engine
from engine.text import Prompt
from tests.bench.main import code, prompts
from tests.bench.measure import Row, peak_bytes, printed, ratio, seconds, summarise, write
from workers.pinned import Pinned

SIZES = [int(size) for size in os.environ.get("BENCH_TOKENS", "10000 100000 1000000").split()]
POLICIES = (100, 1_000)
POINTS = (9, 12, 15, 18, 21, 24)
N_LAYERS, TARGET, BATCH = 30, 20, 8
#: repetitions of each size
TIMES = int(os.environ.get("BENCH_TIMES", 3))
#: of the real model: prompt, target and rows of a batch
PROMPT, TOKENS, ROWS = 256, 32, 8

_PINNED = Pinned(
    model="made-up", weights_hash="w", tokenizer_hash="t", n_layers=N_LAYERS, vocab_size=49_152, max_context=2048,
    exits="made-up", exits_hash=None, head="lens", exit_points=POINTS, device="cpu", device_class="made-up",
    dtype="float32", threads=1, seed=0, max_new_tokens=TARGET, batch_size=BATCH, shard_batches=8, metrics={},
    benchmarks={}, versions={}, trace="reference", controller=True,
    shape={"n_layers": N_LAYERS, "n_heads": 9, "n_kv_heads": 3, "head_size": 64, "hidden_size": 576,
           "layer_parameters": 3_540_000, "element_size": 4},
    heads=(*(4_900_000 for _ in POINTS), 28_300_000),
)  # fmt: skip


def make_trace(db: Database, tokens: int) -> int:
    """A trace of so many random tokens, written as workers write it. Returns its job."""
    samples = tokens // TARGET
    job_id = jobs.create_job(db, name=f"{tokens} tokens", spec={"model": "made-up"})
    lease = queue.claim(db, "maker", kind="prepare", job_id=job_id)
    assert lease is not None
    made = [(f"s{i}", "p", "r", "python", f"g{i // 4}") for i in range(samples)]
    jobs.plan_job(
        db,
        lease,
        pinned=_PINNED.model_dump(mode="json"),
        benchmarks=[PlannedBenchmark(f"{tokens} tokens", "1", f"made-up-{tokens}", "line", made)],
        artifacts=[],
        policies=[PlannedPolicy("trace", "trace", {"trace": {"target": "reference"}})],
    )
    devices.device_plan(db, "made-up", lambda: {"bandwidth": 24e9, "peak": 185e9})
    [run] = jobs.runs(db, job_id)
    with db.read() as connection:
        first = connection.exec_driver_sql("SELECT min(id) FROM sample WHERE benchmark_id = " + str(run.benchmark_id))
        first_id = int(first.scalar_one())
    draw = np.random.default_rng(tokens)
    for begin in range(0, samples, 1_000):
        rows = [
            TraceRow(run.id, first_id + place, 100 + place % 50, place, _arrays(draw))
            for place in range(begin, min(begin + 1_000, samples))
        ]
        with db.write() as connection:
            insert_traces(connection, rows)
    with db.write() as connection:
        connection.exec_driver_sql(f"UPDATE job SET state = '{JobState.DONE}' WHERE id = {job_id}")
    return job_id


def _arrays(draw: np.random.Generator) -> TraceArrays:
    shape = (len(POINTS) + 1, TARGET)
    targets = draw.integers(0, 49_152, TARGET, dtype=np.int32)
    other = draw.integers(0, 49_152, shape, dtype=np.int32)
    judged = draw.dirichlet((1, 1, 1), shape).astype(np.float32).transpose(0, 2, 1)
    columns = [draw.random(shape, dtype=np.float32) for _ in range(4)]
    tokens = np.where(draw.random(shape) < 0.6, targets, other).astype(np.int32)
    return TraceArrays(targets, tokens, *columns, judged, draw.integers(0, 99, shape, dtype=np.int32))


def grid(count: int) -> list[Any]:
    """So many policies of four kinds."""
    quarter = count // 4
    steps = {"from": 0.01, "to": 0.999, "steps": quarter}
    side = {"from": 0.3, "to": 0.999, "steps": quarter // 5}
    return [
        {"confidence": {"threshold": steps}},
        {"margin": {"threshold": steps}},
        {"entropy": {"threshold": steps}},
        {"controller": {"exit": side, "stop": [0.4, 0.5, 0.6, 0.8, 1.0]}},
    ]


def child(url: str, job_id: int, policies: int) -> None:
    """Replay once; seconds, peak in GiB and how many policies it were, as JSON."""
    with closing(open_database(url, create=False)) as db:
        trace = trace_of(db, job_id)
        found: list[Any] = []
        taken = seconds(lambda: found.append(replay_trace(trace, ReplaySpec(policies=grid(policies)))))
    peak = peak_bytes() / 2**30
    print(json.dumps({"seconds": taken, "peak": peak, "policies": len(found[0].policies), "tokens": found[0].tokens}))


def measured(url: str, job_id: int, policies: int) -> dict[str, float]:
    """`child` in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.replay", url, str(job_id), str(policies)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    told = json.loads(answer.splitlines()[-1])
    assert told["policies"] == policies, told
    return dict(told)


def replays(folder: Path) -> Iterator[Row]:
    """The timing table, and how times grow with tokens and with policies."""
    url = f"sqlite:///{folder / 'record.db'}"
    taken: dict[tuple[int, int], list[float]] = {}
    for size in SIZES:
        with closing(open_database(url)) as db:
            job_id = make_trace(db, size)
        for policies in POLICIES:
            once = (size, policies) == (max(SIZES), max(POLICIES))
            runs = [measured(url, job_id, policies) for _ in range(1 if once else TIMES)]
            is_goal = (size, policies) == (100_000, 1_000)
            name = f"{policies:,} policies over {size:,} tokens, 6 exit points"
            taken[size, policies] = [run["seconds"] for run in runs]
            yield summarise(name, taken[size, policies], "s", at_most=10 if is_goal else None)
            peaks = [run["peak"] for run in runs]
            yield summarise(f"{name}: peak memory", peaks, "GiB", at_most=2 if is_goal else None)
    for few, many in pairwise(SIZES):
        for policies in POLICIES:
            name = f"{policies:,} policies: a token of {many:,} against one of {few:,}"
            yield growth(name, taken[many, policies], taken[few, policies], many / few)
    few, many = POLICIES
    for size in SIZES:
        name = f"{size:,} tokens: a policy of {many:,} against one of {few:,}"
        yield growth(name, taken[size, many], taken[size, few], many / few)


def growth(name: str, more: list[float], less: list[float], times: float) -> Row:
    """How much longer so many times more takes than in proportion: 1 is linear. Each run against each."""
    return summarise(name, [one / other / times for one in more for other in less], "x")


def traces() -> Iterator[Row]:
    """What a trace costs: against the cost model, and against its parts."""
    engine = Engine("smollm2-135m", "smollm2-135m")
    some = prompts(engine, ROWS, PROMPT)
    ids = engine.tokenizer(code())["input_ids"]
    targets = [ids[5 + 40 * row : 5 + 40 * row + TOKENS] for row in range(ROWS)]
    whole = [Prompt(prompt.token_ids + target[:-1]) for prompt, target in zip(some, targets, strict=True)]
    states = torch.randn(ROWS * TOKENS, engine.stack.hidden_size)

    @torch.inference_mode()
    def heads() -> None:
        for point in (*engine.exit_points, engine.n_layers):
            for first in range(0, len(states), 128):
                engine.heads.predict(point, states[first : first + 128])

    def parts() -> None:
        engine.prefill(whole, 0)
        heads()

    def trace() -> None:
        engine.trace(some, targets)

    trace()
    price = engine.price(engine.trace(some, targets).work)
    ideal = [seconds(trace) / (price.ideal_ns / 1e9) for _ in range(7)]
    what = f"{ROWS} × ({PROMPT} + {TOKENS}) tokens"
    yield summarise(f"a trace of {what} against the cost model", ideal, "x", at_most=1.15)
    yield ratio(f"a trace of {what} against prefill and heads alone", trace, parts)


def everything() -> Iterator[Row]:
    """Every row of the table, in its order."""
    yield from traces()
    with tempfile.TemporaryDirectory() as folder:
        yield from replays(Path(folder))


def main() -> None:
    """Print the table and write it to build/bench/replay.json."""
    write("replay", printed(everything()))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
