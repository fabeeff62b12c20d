"""`make bench-db`: what the record's figures stand on. No figure is asserted; they are printed and kept.

BENCH_TOKENS in the environment: the size of the biggest job, ten million when absent.
"""

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
from sqlalchemy import text

from cluster.reports.build import build_report
from db import queue
from db.queries import query
from db.records import OutcomeRow
from db.session import Database, open_database
from db.token_columns import write_rows
from tests.bench import postgresql
from tests.bench.big import BYTES, Mould
from tests.bench.claiming import claim_and_complete
from tests.bench.measure import Row, printed, seconds, summarise, write
from tests.bench.shards import TOKENS, Shape, Work
from tests.made import planned_job

MILLION = 1_000_000
#: 512 completions: 64 samples at once under four policies are what fills a GPU
SHARD = Shape(batch=64, batches=2)
SMALL_SHARD = Shape(batch=8, batches=2)
ROUNDS, IN_A_ROUND = 9, 6

#: shards that a worker commits while its memory is watched; it has all it needs after the first hundred
COMMITTED, SETTLED = 1_000, 100


@contextmanager
def record(url: str) -> Iterator[Database]:
    db = open_database(url)
    yield db
    db.close()


@contextmanager
def sqlite_url() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="shortstop-bench-") as folder:
        yield f"sqlite:///{Path(folder) / 'record.db'}"


# --- writing ---------------------------------------------------------------------------------------------------------


def committed(db: Database, name: str, at_least: float) -> Iterator[Row]:
    """Shards claimed and committed as by a worker and, in turn, their outcomes written bare by the same encoder.

    Bare: one transaction into a table with the columns of `outcome`, but no key, index, check or reference; no scores,
    timings, rollups or queue.
    """
    work, write_bare = Work(db, SHARD, (ROUNDS + 1) * IN_A_ROUND), bare(db)
    own, plain = [], []
    for _ in range(ROUNDS + 1):
        shards = [work.made() for _ in range(IN_A_ROUND)]
        pairs = [(seconds(partial(work.commit, one)), seconds(partial(write_bare, one.outcomes))) for one in shards]
        took, took_bare = map(sum, zip(*pairs, strict=True))
        own.append(took)
        plain.append(took_bare)
    own, plain, tokens = own[1:], plain[1:], IN_A_ROUND * SHARD.tokens  # the first was a warm-up
    yield summarise(f"{name}: tokens committed", [tokens / one for one in own], "tok/s", at_least)
    yield summarise(f"{name}: tokens written bare", [tokens / one for one in plain], "tok/s")
    yield summarise(f"{name}: committed over bare", [b / a for a, b in zip(own, plain, strict=True)], "x", 0.5)


def bare(db: Database) -> Callable[[Sequence[OutcomeRow]], None]:
    """Writes outcomes into a table that has nothing but their columns."""
    on_sqlite = "CREATE TABLE bare AS SELECT * FROM outcome WHERE false"
    with db.write() as connection:
        like = on_sqlite if db.dialect == "sqlite" else "CREATE TABLE bare (LIKE outcome INCLUDING DEFAULTS)"
        connection.execute(text(like))

    def write_bare(outcomes: Sequence[OutcomeRow]) -> None:
        with db.write() as connection:
            write_rows(connection, "bare", 1, outcomes)

    return write_bare


def bytes_of_a_token(db: Database) -> Row:
    """The table of outcomes with its indices, over all tokens in it."""
    with db.read() as connection:
        size = connection.execute(text("SELECT pg_total_relation_size('outcome')")).scalar_one()
        tokens = connection.execute(text("SELECT sum(n_tokens) FROM outcome")).scalar_one()
    value = float(size) / float(tokens)
    return Row("PostgreSQL: bytes of a token on disk", value, value, value, "bytes", at_most=28)


def memory(url: str, name: str) -> Row:
    """How far a worker's memory grows while it commits shards, in a process of its own."""
    answer = subprocess.run(
        [sys.executable, "-m", "tests.bench.record", "--memory", url], capture_output=True, text=True, check=True
    )
    grown = float(answer.stdout.split()[-1])
    label = f"{name}: memory grown from shard {SETTLED} to {COMMITTED}"
    return Row(label, grown, grown, grown, "MB", at_most=4)


def measure_memory(url: str) -> float:
    """In this process: megabytes."""
    with record(url) as db:
        work, process = Work(db, SMALL_SHARD, COMMITTED), psutil.Process()
        sizes = []
        for _ in range(COMMITTED):
            work.commit(work.made())
            sizes.append(process.memory_info().rss)
        gc.collect()
        return (process.memory_info().rss - sizes[SETTLED - 1]) / 1e6


# --- the queue -------------------------------------------------------------------------------------------------------


def shards_at_once(url: str, workers: int = 8, shards: int = 1_500) -> Row:
    """Claimed and completed by processes at once; a shard that came twice, or never, ends the measurement."""
    rates = []
    with record(url) as db:
        for _ in range(3):
            job_id = planned_job(db, shards, batch_size=1, shard_batches=1, policies=["full"])
            shares = claim_and_complete(url, job_id, workers)
            found = [task_id for share in shares for task_id in share.task_ids]
            assert len(found) == len(set(found)) == shards, "a shard came twice or never"
            rates.append(shards / (max(share.ended for share in shares) - min(share.began for share in shares)))
    return summarise(f"PostgreSQL: claimed and completed, {workers} processes", rates, "shard/s", at_least=300)


def long_queue(db: Database, name: str, short: int = 100, long: int = 100_000) -> Row:
    """Claims from a long queue over claims from a short one, in turn."""
    cut = {"batch_size": 1, "shard_batches": 1}
    jobs = [planned_job(db, n, **cut, policies=["full"], benchmarks=[f"lines {n}"]) for n in (short, long)]

    def claims(job_id: int) -> None:
        for _ in range(6):
            assert queue.claim(db, "worker", kind="shard", job_id=job_id) is not None

    pairs = [[seconds(partial(claims, job_id)) for job_id in jobs] for _ in range(14)][1:]
    label = f"{name}: claim, {long} shards queued over {short}"
    return summarise(label, [b / a for a, b in pairs], "x", at_most=1.5)


# --- reading ---------------------------------------------------------------------------------------------------------


def reports(mould: Mould, sizes: Sequence[int]) -> Iterator[Row]:
    """Opening the report of a finished job."""
    for tokens in sizes:
        job_id = mould.cast(tokens)
        build_report(mould.db, job_id)
        took = [seconds(partial(build_report, mould.db, job_id)) for _ in range(7)]
        yield summarise(f"PostgreSQL: report of {tokens // MILLION} M tokens", took, "s", at_most=0.3)


def question(mould: Mould, tokens: int = 10 * MILLION) -> Row:
    """Over every token of one run."""
    job_id = mould.cast(tokens, runs=[1])
    with mould.db.read() as connection:
        run_id = connection.execute(text("SELECT id FROM run WHERE job_id = :job"), {"job": job_id}).scalar_one()
    sql = f"select exit_layer, count(*) from token where run_id = {run_id} group by 1"
    counted = sum(n for _, n in query(mould.db, sql, timeout_s=120))
    assert abs(counted / tokens - 1) < 0.01, counted
    took = [seconds(lambda: list(query(mould.db, sql, timeout_s=120))) for _ in range(3)]
    return summarise(f"PostgreSQL: exit layers of {tokens // MILLION} M tokens", took, "s", at_most=6)


def sizes_of_reports() -> list[int]:
    """Up to BENCH_TOKENS, and as the disk allows."""
    biggest = int(os.environ.get("BENCH_TOKENS", 10 * MILLION))
    sizes = [size for size in (MILLION, 10 * MILLION, 100 * MILLION) if size <= biggest]
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < 2 * biggest * BYTES:
        sys.exit(f"{biggest} tokens need {2 * biggest * BYTES / 1e9:.0f} GB of disk, {free / 1e9:.0f} are free")
    return sizes


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Print the table and write it to build/bench/record.json."""
    if sys.argv[1:2] == ["--memory"]:
        print(measure_memory(sys.argv[2]))
        return
    sizes = sizes_of_reports()
    print(f"{TOKENS} tokens a completion, {SHARD.tokens} a shard; load before: {os.getloadavg()[0]:.2f}")
    with postgresql.server() as server:
        write("record", printed(everything(server, sizes)))


def everything(server: str, sizes: Sequence[int]) -> Iterator[Row]:
    """Every row of the table, in its order."""
    with postgresql.database(server) as url, record(url) as db:
        yield from committed(db, "PostgreSQL", at_least=600_000)
        yield bytes_of_a_token(db)
    with sqlite_url() as url, record(url) as db:
        yield from committed(db, "SQLite", at_least=200_000)
    for name, new in (("PostgreSQL", partial(postgresql.database, server)), ("SQLite", sqlite_url)):
        with new() as url:
            yield memory(url, name)
        with new() as url, record(url) as db:
            yield long_queue(db, name)
    with postgresql.database(server) as url:
        yield shards_at_once(url)
    with postgresql.database(server) as url, record(url) as db:
        mould = Mould(db)
        yield from reports(mould, sizes)
        yield question(mould)


if __name__ == "__main__":
    main()
