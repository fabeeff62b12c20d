"""No question that the product asks reads a big table from end to end: both databases explain the plans they make."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pytest
from made import claimed, planned_job, results_of, summarise, work
from sqlalchemy import event, inspect, text

from cluster.reports.build import build_report
from db import demand, jobs, queue, results
from db.rollups import rollup
from db.session import Database, open_database

#: those that grow with the work
BIG = {"sample", "outcome", "score_row", "timing", "rollup", "task"}
#: as views and joins call them
ALIASES = {"s": "sample", "o": "outcome", "c": "score_row", "t": "timing"}

#: a finished job and copies of it
DONE, COPIES = 1, 40
#: jobs that workers are on, and their shards
OPEN, SHARDS = 8, 400


@pytest.fixture(scope="module", params=["sqlite", "sqlite, analysed", "postgresql"])
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """One record for all questions. PostgreSQL analyses by itself, SQLite only where somebody asks it to."""
    if request.param.startswith("sqlite"):
        yield from _filled(f"sqlite:///{tmp_path_factory.mktemp('plans') / 'record.db'}", request.param != "sqlite")
        return
    with request.getfixturevalue("new_postgresql_url")() as url:
        yield from _filled(url, True)


def _filled(url: str, analysed: bool) -> Iterator[Database]:
    db = open_database(url)
    assert planned_job(db, 240, batch_size=4) == DONE
    work(db)
    results.finalise(db, DONE, lambda data: summarise(data) | {"samples": len(data.sample)})
    for table in ("job", "run", "task", "outcome", "score_row", "timing", "rollup"):
        _copy(db, table)
    for _ in range(OPEN):
        planned_job(db, SHARDS * 8, batch_size=8, shard_batches=1, benchmarks=("more",))
    if analysed:
        with db.write() as connection:
            connection.execute(text("ANALYZE"))
    yield db
    db.close()


def _copy(db: Database, table: str) -> None:
    """The rows of the finished job, on its samples, once for each of the other jobs."""
    with db.write() as connection:
        names = [column["name"] for column in inspect(connection).get_columns(table)]
        moved = {"id", "job_id", "run_id", "task_id"}
        selected = ", ".join(f"o.{name} + n.i * 1000000" if name in moved else f"o.{name}" for name in names)
        numbers = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {COPIES})"
        columns = ", ".join(names)
        connection.execute(text(f"{numbers} INSERT INTO {table} ({columns}) SELECT {selected} FROM {table} o, n"))


def commit(db: Database) -> None:
    lease = claimed(db)
    results.commit_shard(db, lease, results_of(db, lease))


def renew(db: Database) -> None:
    queue.renew(db, claimed(db), 1)


def open_job(db: Database) -> int:
    return next(job.id for job in jobs.list_jobs(db) if not job.state.ended)


def last_run(db: Database) -> int:
    return jobs.runs(db, DONE)[-1].id


#: what the product does all day
DOORS: dict[str, Callable[[Database], object]] = {
    "claim a shard": claimed,
    "claim a shard of a job": lambda db: claimed(db, job_id=open_job(db)),
    "claim a shard of some jobs": lambda db: claimed(db, job_id=[open_job(db), open_job(db) - 1]),
    "claim a shard with what it consists of": lambda db: results.claim_shard(db, "worker"),
    "open jobs": demand.open_jobs,
    "claim what is to be prepared": lambda db: queue.claim(db, "worker", kind="prepare"),
    "renew": renew,
    "commit": commit,
    "reap": queue.reap,
    "progress": lambda db: jobs.progress(db, DONE),
    "runs": lambda db: jobs.runs(db, DONE),
    "has the job ended": lambda db: jobs.finished(db, DONE),
    "samples": lambda db: results.samples_of(db, 1, 100, 108),
    "completions": lambda db: list(islice(results.completions(db, run_id=last_run(db)), 300)),
    "tokens": lambda db: list(results.tokens(db, run_id=last_run(db))),
    "what a summary is made of": lambda db: results.run_data(db, last_run(db)),
    "sums": lambda db: rollup(db, last_run(db)),
    "report": lambda db: build_report(db, DONE),
}

#: what people ask of the views
QUESTIONS = {
    "tokens of a run": "SELECT exit_layer, count(*) FROM token WHERE run_id = 2 GROUP BY 1",
    "completions of a run": "SELECT text FROM completion WHERE run_id = 2",
    "scores of a run": "SELECT metric, avg(value) FROM completion_score WHERE run_id = 2 GROUP BY 1",
    "batches of a run": "SELECT sum(decode_ns) FROM batch WHERE run_id = 2",
    "tokens of a job": "SELECT count(*) FROM token WHERE job_id = 1",
}


@pytest.mark.parametrize("door", DOORS)
def test_the_product_reads_no_big_table_from_end_to_end(filled: Database, door: str) -> None:
    """Red where an index is missing, or a condition is written so that it cannot be used."""
    with asked(filled) as statements:
        DOORS[door](filled)
    assert statements
    for statement, parameters in statements:
        plan = explained(filled, statement, parameters)
        assert read_in_full(plan) == set(), f"{statement}\n{plan}"


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_about_one_run_reads_that_run_only(filled: Database, question: str) -> None:
    plan = explained(filled, QUESTIONS[question], None)
    assert read_in_full(plan) == set(), plan


@pytest.mark.parametrize(
    ("door", "index"),
    [
        ("claim a shard", "ix_task_ready"),
        ("claim a shard of a job", "ix_task_ready"),
        ("reap", "ix_task_leased"),
        ("progress", "ix_task_job_id"),
    ],
)
def test_the_queue_uses_the_indices_made_for_it(filled: Database, door: str, index: str) -> None:
    with asked(filled) as statements:
        DOORS[door](filled)
    assert any(index in explained(filled, *statement) for statement in statements)


@contextmanager
def asked(db: Database) -> Iterator[list[tuple[str, Any]]]:
    """The statements that are executed meanwhile, with their parameters (of several rows, the first one's)."""
    seen: list[tuple[str, Any]] = []

    def note(_: Any, __: Any, statement: str, parameters: Any, ___: Any, many: bool) -> None:
        if statement.startswith(("SELECT", "UPDATE", "DELETE", "WITH")):
            seen.append((statement, parameters[0] if many else parameters))

    event.listen(db._engine, "before_cursor_execute", note)
    yield seen
    event.remove(db._engine, "before_cursor_execute", note)


def explained(db: Database, statement: str, parameters: Any) -> str:
    """The plan that the database makes; nothing is executed."""
    explain = "EXPLAIN QUERY PLAN" if db.dialect == "sqlite" else "EXPLAIN"
    with db.read() as connection:
        rows = connection.exec_driver_sql(f"{explain} {statement}", parameters)
        return "\n".join(str(row[-1]) for row in rows)


def read_in_full(plan: str) -> set[str]:
    """The big tables that a plan reads from end to end. Part of a table has an index of its own: `ix_task_...`."""
    found = re.findall(r"Seq Scan on (\w+)", plan)
    found += re.findall(r"^SCAN (\w+)(?! VIRTUAL TABLE| .*ix_task_(?:ready|leased))", plan, re.MULTILINE)
    return BIG & {ALIASES.get(name, name) for name in found}
