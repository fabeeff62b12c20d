"""`make bench-service`: how the server stands up to a team. No figure is asserted; they are printed and kept."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
from sqlalchemy import insert, text

from db import events, jobs
from db.keys import Scope, create_key
from db.session import Database, open_database
from db.tables import job
from tests.bench import postgresql
from tests.bench.load import Load, Task, put
from tests.bench.measure import Row, printed, summarise, write
from tests.made import planned_job

JOBS, CLIENTS, ROUNDS = 10_000, 32, 5
#: requests of a client in a round
LISTS, SUBMITS = 60, 12
LISTENERS, EVENTS = 100, 30
#: completions that are exported, over four runs
ROWS, RUNS = 1_000_000, 4
SPEC = {
    "name": "load",
    "model": "smollm2-135m",
    "exits": "smollm2-135m",
    "benchmarks": ["humaneval-lines"],
    "policies": ["full", {"confidence": {"threshold": 0.9}}, {"sec": {"exit": 0.9, "stop": 0.9}}],
}


class Served:
    """A server in a process of its own."""

    def __init__(self, database_url: str, folder: Path, port: int = 0) -> None:
        command = [str(Path(sys.executable).parent / "shortstop"), "serve", "--no-fleet", "--port", str(port)]
        environment = os.environ | {
            "SHORTSTOP_UPLOADS": str(folder / "uploads"),
            "SHORTSTOP_REQUESTS_PER_SECOND": "1000000",
        }
        command += ["--database", database_url]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.process.stderr is not None
        line = next(line for line in self.process.stderr if line.startswith("serving on "))
        # a pipe that nobody reads holds 64 kB, and then the server waits
        threading.Thread(target=deque, args=(self.process.stderr, 0), daemon=True).start()
        self.url = line.split()[2].rstrip(",")
        self.port = int(self.url.rsplit(":", 1)[1])

    def megabytes(self) -> float:
        return float(psutil.Process(self.process.pid).memory_info().rss) / 1e6

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def serving(database_url: str, folder: Path) -> Iterator[Served]:
    served = Served(database_url, folder)
    try:
        yield served
    finally:
        served.process.terminate()
        served.process.wait()


def keys_of(db: Database, count: int) -> list[str]:
    """A key for each client, as many people have them."""
    return [create_key(db, f"client-{number}", [Scope.ADMIN])[0] for number in range(count)]


def with_jobs(db: Database) -> None:
    """The record of a team of some months."""
    rows = [
        {"name": f"nightly-{number}", "spec": SPEC, "state": "done", "priority": 0, "created_at": 1.7e9 + number}
        for number in range(JOBS)
    ]
    with db.write() as connection:
        connection.execute(insert(job), rows)


# --- many clients ----------------------------------------------------------------------------------------------------


def lists(served: Served, keys: Sequence[str], name: str) -> Iterator[Row]:
    """The list of jobs, by clients that ask again as soon as they are answered."""
    task = Task(served.url, list(keys), "GET", "/v1/jobs", LISTS)
    put(task)
    loads = [put(task) for _ in range(ROUNDS)]
    p99 = [float(np.percentile(load.latencies, 99)) * 1000 for load in loads]
    yield summarise(f"{name}: GET /v1/jobs of {JOBS} jobs, p99", p99, "ms", at_most=100)
    yield summarise(f"{name}: GET /v1/jobs, {CLIENTS} clients", [_rate(load) for load in loads], "1/s")
    yield exactly(f"{name}: GET /v1/jobs, errors", sum(_others(load, "200") for load in loads), 0)


def submissions(served: Served, keys: Sequence[str], name: str) -> Iterator[Row]:
    task = Task(served.url, list(keys), "POST", "/v1/jobs", SUBMITS, json.dumps(SPEC), "warm")
    put(task)
    loads = [put(Task(**vars(task) | {"idempotency": f"round{number}"})) for number in range(ROUNDS)]
    yield summarise(f"{name}: submitted, {CLIENTS} clients", [_rate(load) for load in loads], "job/s", at_least=80)
    yield exactly(f"{name}: submitted, errors", sum(_others(load, "202") for load in loads), 0)


def across_a_death(db: Database, folder: Path, keys: Sequence[str], name: str) -> Iterator[Row]:
    """The server is killed in the middle of submissions, started again, and every client sends all of its own again."""
    before = len(jobs.list_jobs(db))
    task = Task("", list(keys), "POST", "/v1/jobs", 20, json.dumps(SPEC), "death")
    served = Served(db.url, folder)
    task = Task(**vars(task) | {"url": served.url})
    found: list[Load] = []
    putting = threading.Thread(target=lambda: found.append(put(task)))
    putting.start()
    while len(jobs.list_jobs(db)) < before + 100:
        time.sleep(0.02)
    served.kill()
    putting.join()
    served = Served(db.url, folder, served.port)
    again = put(task)
    served.kill()
    written = len(jobs.list_jobs(db)) - before
    lost = set(found[0].jobs) - set(again.jobs)
    yield exactly(f"{name}: lines that kill -9 broke", found[0].statuses.get("lost", 0))
    yield exactly(f"{name}: doubled across kill -9", written - len(set(again.jobs)), 0)
    yield exactly(f"{name}: lost across kill -9", len(lost) + len(keys) * 20 - written, 0)


def _rate(load: Load) -> float:
    return len(load.latencies) / load.seconds


def _others(load: Load, good: str) -> int:
    return sum(count for status, count in load.statuses.items() if status != good)


def exactly(name: str, value: float, at_most: float | None = None, unit: str = "") -> Row:
    """A count, or what was seen once."""
    return Row(name, value, value, value, unit, at_most=at_most)


# --- many listeners --------------------------------------------------------------------------------------------------


def listeners(served: Served, db: Database, key: str, name: str) -> Iterator[Row]:
    """All listen to one job, to which something happens every so often: when each of them hears of it."""
    job_id = planned_job(db, 8)
    before = events.events(db, job_id)[-1].id
    arrivals: list[float] = []
    heard = threading.Semaphore(0)

    def listen() -> None:
        headers = {"Authorization": f"Bearer {key}", "Last-Event-ID": str(before)}
        with httpx.stream("GET", f"{served.url}/v1/jobs/{job_id}/events", headers=headers, timeout=60) as answer:
            for line in answer.iter_lines():
                if line.startswith("retry"):
                    heard.release()
                if line.startswith("data: ") and '"at"' in line:
                    arrivals.append(time.time() - json.loads(line[6:])["at"])
                    heard.release()

    threads = [threading.Thread(target=listen) for _ in range(LISTENERS)]
    for thread in threads:
        thread.start()
    _all_heard(heard)
    sizes: list[float] = []
    for number in range(EVENTS):
        change = jobs.unpause_job if number % 2 else jobs.pause_job
        assert change(db, job_id)
        _all_heard(heard)
        sizes.append(served.megabytes())
    jobs.cancel_job(db, job_id)
    for thread in threads:
        thread.join()
    late = [float(np.max(arrivals[at : at + LISTENERS])) for at in range(0, LISTENERS * EVENTS, LISTENERS)]
    yield summarise(f"{name}: the last of {LISTENERS} listeners hears of an event", late, "s", at_most=1)
    yield exactly(f"{name}: memory grown over {EVENTS} events", sizes[-1] - sizes[EVENTS // 3], 4, "MB")


def _all_heard(heard: threading.Semaphore) -> None:
    for _ in range(LISTENERS):
        assert heard.acquire(timeout=60), "a listener heard nothing"


# --- a large export --------------------------------------------------------------------------------------------------

_OUTCOMES = """
INSERT INTO outcome (run_id, sample_id, task_id, text, n_tokens, prompt_tokens, cut_tokens, shown, isolated)
SELECT r.id, s.id, (SELECT min(id) FROM task WHERE job_id = :job), 'return a + ' || s.position, 10, 50, 0, true, false
FROM run r JOIN sample s ON s.benchmark_id = r.benchmark_id WHERE r.job_id = :job
"""
_METRICS = "INSERT INTO metric_list (list_id, place, metric, version) VALUES (1, 1, 'es', 'es@bench')"
_SCORES = """
INSERT INTO score_row (run_id, revision, sample_id, list_id, scores)
SELECT r.id, r.score_revision, s.id, 1, '{}'
FROM run r JOIN sample s ON s.benchmark_id = r.benchmark_id WHERE r.job_id = :job
"""
_HALF = {"sqlite": "[0.5]", "postgresql": "{0.5}"}


def big_job(db: Database) -> int:
    """A job with ROWS completions and as many scores, written by SQL."""
    policies = ["full", *(f"confidence threshold=0.{number}" for number in range(5, 5 + RUNS - 1))]
    job_id = planned_job(db, ROWS // RUNS, batch_size=64, shard_batches=16, policies=policies, benchmarks=["big"])
    with db.write() as connection:
        connection.execute(text(_OUTCOMES), {"job": job_id})
        connection.execute(text(_METRICS))
        connection.execute(text(_SCORES.format(_HALF[db.dialect])), {"job": job_id})
    return job_id


def export(served: Served, key: str, job_id: int, form: str, name: str) -> Iterator[Row]:
    """Every completion of the big job, read as fast as it comes; the server's memory from a tenth of it on."""
    sizes, lengths, began = [], [], time.perf_counter()
    url = f"{served.url}/v1/jobs/{job_id}/completions?format={form}"
    with httpx.stream("GET", url, headers={"Authorization": f"Bearer {key}"}, timeout=300) as answer:
        assert answer.status_code == 200
        for piece in answer.iter_raw():
            lengths.append(len(piece))
            if len(lengths) % 50 == 0:
                sizes.append((sum(lengths), served.megabytes()))
                lengths[:] = [sum(lengths)]
    whole, took = sum(lengths), time.perf_counter() - began
    after = [size for at, size in sizes if at > whole / 10]
    yield exactly(f"{name}: {form} of {ROWS} completions, memory grown", max(after) - after[0], 8, "MB")
    yield exactly(f"{name}: {form} of {ROWS} completions", ROWS / took, unit="row/s")


# ---------------------------------------------------------------------------------------------------------------------


def everything(url: str, name: str, folder: Path) -> Iterator[Row]:
    """Every row of the table on one database."""
    with closing(open_database(url)) as db:
        keys = keys_of(db, CLIENTS)
        with_jobs(db)
        with serving(url, folder) as served:
            yield from lists(served, keys, name)
            yield from submissions(served, keys, name)
            yield from listeners(served, db, keys[0], name)
        yield from across_a_death(db, folder, keys, name)
        job_id = big_job(db)
        with serving(url, folder) as served:
            for form in ("ndjson", "csv", "parquet"):
                yield from export(served, keys[0], job_id, form, name)


def main() -> None:
    """Print the table and write it to build/bench/service.json."""
    print(f"{CLIENTS} clients, the load from one more process; load before: {os.getloadavg()[0]:.2f}")
    with tempfile.TemporaryDirectory(prefix="shortstop-bench-") as kept, postgresql.server() as server:
        folder = Path(kept)
        rows = list(printed(everything(f"sqlite:///{folder / 'record.db'}", "SQLite", folder)))
        with postgresql.database(server) as url:
            rows += printed(everything(url, "PostgreSQL", folder))
    write("service", rows)


if __name__ == "__main__":
    main()
