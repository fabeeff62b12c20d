"""Two runs of 100,000 samples compared: how long it takes, and how much memory, in a process of its own."""

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cluster.comparing.build import compare
from cluster.comparing.sides import Asked
from db import jobs, results
from db.session import open_database
from tests.bench import postgresql
from tests.bench.measure import Row, seconds, summarise
from tests.bench.shards import Shape, Work
from workers.estimates import summarise as summary

SAMPLES = int(os.environ.get("BENCH_COMPARED", 100_000))
SHAPE = Shape(batch=64, batches=4)


def compared_in_a_process(server: str) -> Iterator[Row]:
    """On PostgreSQL and SQLite; each figure is of a fresh process, imports left out of the time."""
    with postgresql.database(server) as url:
        yield from _compared("PostgreSQL", url)
    with tempfile.TemporaryDirectory(prefix="shortstop-bench-") as folder:
        yield from _compared("SQLite", f"sqlite:///{Path(folder) / 'record.db'}")


def _compared(name: str, url: str) -> Iterator[Row]:
    a, b = _written(url)
    answers = [_in_a_process(url, a, b) for _ in range(3)]
    label = f"{name}: two runs of {SAMPLES:,} samples compared"
    yield summarise(label, [took for took, _ in answers], "s", at_most=10)
    yield summarise(f"{label}: memory at its peak", [peak for _, peak in answers], "MB", at_most=1024)


def _written(url: str) -> tuple[int, int]:
    """Two runs of a finished job of that many samples, as a worker writes them."""
    db = open_database(url)
    shards = SAMPLES // SHAPE.samples
    work = Work(db, SHAPE, shards)
    for _ in range(shards):
        work.commit(work.made())
    assert results.finalise(db, work.job_id, summary)
    _, a, b, _ = jobs.runs(db, work.job_id)
    db.close()
    return a.id, b.id


def _in_a_process(url: str, a: int, b: int) -> tuple[float, float]:
    command = [sys.executable, "-m", "tests.bench.big_pairs", url, str(a), str(b)]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    took, peak = map(float, answer.stdout.split())
    return took, peak


def main() -> None:
    """Compare two runs; print seconds and megabytes."""
    url, a, b = sys.argv[1:]
    db = open_database(url, create=False)
    took = seconds(lambda: compare(db, Asked(None, run_id=int(a)), Asked(None, run_id=int(b))))
    print(took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
