"""`shortstop db check`: each promise of the record is broken once, in a real database, and named."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import sqlalchemy
from made import claimed, planned_benchmark, planned_job, planned_policy, results_of, summarise, work
from sqlalchemy import text

from db import jobs, planning, queue, recount, results
from db.checks import Hashes, check, rebuild_rollups
from db.records import SampleRow, ScoreRow, ShardResults
from db.rollups import rollup
from db.session import Database

POLICIES = ("full", "self-speculative exit_layer=18")


def made_hash(version: str, ends: str, samples: Iterable[SampleRow]) -> str:
    """What `made.planned_benchmark` calls its content, as long as it is that."""
    found = [(one.name, one.prompt, one.reference, one.language, one.source_group) for one in samples]
    made = planned_benchmark(len(found))
    return made.content_hash if found == made.samples and ends == "line" else "another"


HASHES = Hashes(made_hash, lambda kind, content: "hash-of-exits" if content == b"\x00exits" else "another")


@pytest.fixture
def done(db: Database) -> Database:
    """A finished job of 23 samples, of which one shard was split."""
    job_id = planned_job(db, 23, shard_batches=4, policies=POLICIES)
    lease = claimed(db)
    results.commit_shard(db, lease, results_of(db, lease, end_batch=1), split_at=1)
    work(db)
    results.finalise(db, job_id, summarise)
    return db


@contextmanager
def unguarded(db: Database) -> Iterator[None]:
    """Foreign keys and triggers are off, as after a restore that went wrong."""
    if db.dialect == "postgresql":
        with db.write() as connection:
            name = connection.exec_driver_sql("SELECT current_database()").scalar_one()
            connection.exec_driver_sql(f'ALTER DATABASE "{name}" SET session_replication_role = replica')
        db.close()
        yield
        with db.write() as connection:
            connection.exec_driver_sql(f'ALTER DATABASE "{name}" RESET session_replication_role')
        db.close()
        return

    def off(connection, _) -> None:
        connection.execute("PRAGMA foreign_keys = OFF")

    db.close()
    sqlalchemy.event.listen(db._engine, "connect", off)
    yield
    sqlalchemy.event.remove(db._engine, "connect", off)
    db.close()


def broken(db: Database, *statements: str) -> list[str]:
    """The violations after these statements."""
    with unguarded(db), db.write() as connection:
        for statement in statements:
            connection.execute(text(statement))
    return list(check(db, HASHES))


def test_a_sound_record_has_no_violations(done: Database) -> None:
    """Also with a job under way, one that was cancelled, and one to which a policy was added."""
    planning.add_policy(done, 1, planned_policy("patience patience=2"))
    assert list(check(done, HASHES)) == [], "shards of the new policy are waiting"
    while lease := queue.claim(done, "worker", kind="shard"):
        added = {run.id for run in results.runs_of_shard(done, lease)}
        made = results_of(done, lease)
        own = [[row for row in rows if row.run_id in added] for rows in (made.outcomes, made.scores, made.timings)]
        results.commit_shard(done, lease, ShardResults(*own))
    results.finalise(done, 1, summarise)
    under_way = planned_job(done, 23, policies=POLICIES)
    lease = claimed(done, job_id=under_way)
    results.commit_shard(done, lease, results_of(done, lease))
    jobs.cancel_job(done, planned_job(done, 23))
    jobs.create_job(done, name="waits", spec={"model": "none"})
    assert list(check(done, HASHES)) == []


def test_a_record_without_anything_has_no_violations(db: Database) -> None:
    assert list(check(db, HASHES)) == []


#: the last seven samples
DONE_SHARD = "SELECT id FROM task WHERE first_batch = 8"
GONE = (
    "DELETE FROM score_row WHERE run_id = 1 AND sample_id = 5; DELETE FROM outcome WHERE run_id = 1 AND sample_id = 5"
)
LESS_TOKENS = {
    "sqlite": "UPDATE outcome SET tokens = '[[5,30,30,0,0.5]]', n_tokens = 2, finish = 'eos' WHERE id = 3",
    "postgresql": "UPDATE outcome SET token_ids = '{5}', n_tokens = 2, finish = 'eos' WHERE id = 3",
}


@pytest.mark.parametrize(
    ("statements", "expected"),
    [
        (GONE, r"run 1 \(full on lines\) of job 1: 1 samples of shard .*, which is done, .* 's/4' first"),
        (
            f"DELETE FROM rollup WHERE run_id = 2 AND task_id = ({DONE_SHARD});"
            "DELETE FROM timing WHERE run_id = 2 AND batch >= 8;"
            "DELETE FROM score_row WHERE run_id = 2;"
            f"DELETE FROM outcome WHERE run_id = 2 AND task_id = ({DONE_SHARD})",
            r"run 2 \(self-spec.* on lines\) of job 1: 7 samples of shard .*, which is done, .* 's/16' first",
        ),
        (
            f"UPDATE outcome SET task_id = ({DONE_SHARD}) WHERE run_id = 1 AND sample_id = 1",
            r"run 1 of job 1: 1 outcomes lie outside the done shards that they name, that of sample 1 first",
        ),
        (
            f"UPDATE task SET state = 'ready' WHERE id = ({DONE_SHARD})",
            r"run 1 of job 1: 7 outcomes lie outside the done shards that they name, that of sample 17 first",
        ),
        (f"UPDATE task SET state = 'ready' WHERE id = ({DONE_SHARD})", r"job 1 is done and has 1 tasks that are not"),
        (
            f"UPDATE task SET end_batch = end_batch - 1 WHERE id = ({DONE_SHARD})",
            r"job 1: its shards do not cut benchmark 'lines' into parts that cover every batch equally often",
        ),
        ("UPDATE run SET summary = NULL WHERE id = 2", r"job 1 is done and run 2 \(self-.* on lines\) has no summary"),
        ("UPDATE sample SET prompt = 'other' WHERE id = 3", r"benchmark 1 \('lines'\): its samples hash to another"),
        (
            "DELETE FROM score_row; DELETE FROM outcome; DELETE FROM sample WHERE id = 23",
            r"benchmark 1 \('lines'\) has 22 samples where 23 belong",
        ),
        ("UPDATE artifact SET hash = 'another'", r"artifact another \(exits\): its content does not have this hash"),
        (
            """UPDATE job SET pinned = '{"batch_size": 2, "shard_batches": 4, "exits_hash": "lost"}'""",
            r"job 1: its exits lost are not among the artifacts",
        ),
        (
            "UPDATE rollup SET flops = flops + 1 WHERE run_id = 1 AND task_id = (SELECT max(task_id) FROM rollup)",
            r"run 1 \(full on lines\) of job 1: the rollup of shard \d+ says flops \d+, counted are \d+; run `short",
        ),
        (
            """UPDATE rollup SET exit_histogram = '{"3": 1}' WHERE run_id = 2""",
            r"the rollup of shard \d+ says exit_histogram {3: 1}, counted are {",
        ),
        (
            "UPDATE score_row SET scores = (SELECT max(highest.scores) FROM score_row highest)",
            r"the rollup of shard \d+ says score_sums {'em",
        ),
        (
            "DELETE FROM metric_list WHERE metric = 'em'",
            r"run 1 of job 1: 23 completions have other scores than their list of metrics names, that of sample 1 ",
        ),
        ("DELETE FROM rollup WHERE run_id = 1", r"run 1 .*: the rollup of shard \d+ is missing; run `shortstop db"),
        (
            "INSERT INTO timing (run_id, batch, rows, prefill_ns, decode_ns, decode_tokens, flops, ideal_ns,"
            " device_class, timed, drafted, drafts_kept) SELECT run_id, 99, rows, prefill_ns, decode_ns, decode_tokens,"
            " flops, ideal_ns, device_class, timed, drafted, drafts_kept FROM timing WHERE run_id = 1 AND batch = 0",
            r"run 1 .*: 1 batches are timed outside its done shards",
        ),
        (GONE.split(";")[1], r"run 1 .*: 2 scores are of samples without an outcome"),
        ("DELETE FROM run WHERE id = 2", r"table outcome: 23 rows have a run_id that is not in run, 2 first"),
        ("DELETE FROM run WHERE id = 2", r"table score_row: \d+ rows have a run_id that is not in run, 2 first"),
        ("DELETE FROM sample WHERE id = 3", r"table outcome: 2 rows have a sample_id that is not in sample, 3 first"),
        ("DELETE FROM sample WHERE id = 3", r"table score_row: 2 rows have a sample_id that is not in sample, 3 first"),
        (f"DELETE FROM task WHERE id = ({DONE_SHARD})", r"table outcome: 14 rows have a task_id that is not in task"),
        ("DELETE FROM task WHERE state = 'split'", r"table task: 2 rows have a parent_id that is not in task"),
        (
            "INSERT INTO job_event (job_id, at, who, what, detail) VALUES (77, 1.5, 'local', 'cancelled', '{}')",
            r"table job_event: 1 rows are of jobs that are gone; run `shortstop db prune` again",
        ),
    ],
)
def test_each_broken_promise_is_named(done: Database, statements: str, expected: str) -> None:
    """One sentence with what, where and a remedy."""
    found = broken(done, *statements.split(";"))
    assert any(re.search(expected, sentence) for sentence in found), found
    assert all(sentence.count("\n") == 0 and "; " in sentence and sentence.endswith(".") for sentence in found)


def test_tokens_that_are_not_what_an_outcome_counts_are_named(done: Database) -> None:
    [sentence] = broken(done, LESS_TOKENS[done.dialect])
    assert "1 outcomes have another number of token records than they count" in sentence


@pytest.mark.parametrize("tokens", ["[[5,30,", "null"])
def test_tokens_that_cannot_be_read_are_named(sqlite_db: Database, tokens: str) -> None:
    planned_job(sqlite_db, 3, policies=["full"])
    work(sqlite_db)
    [sentence] = broken(sqlite_db, f"UPDATE outcome SET tokens = '{tokens}' WHERE id = 1")
    assert "1 outcomes have another number of token records than they count" in sentence


def test_rollups_are_rebuilt_from_a_recount(done: Database) -> None:
    """Wrong, missing and superfluous ones; sound ones are not written again."""
    before = [rollup(done, run.id) for run in jobs.runs(done, 1)]
    assert rebuild_rollups(done) == 0
    violations = broken(
        done,
        "UPDATE rollup SET tokens = 5 WHERE run_id = 1",
        "DELETE FROM rollup WHERE run_id = 2 AND task_id = (SELECT min(task_id) FROM rollup WHERE run_id = 2)",
        "UPDATE rollup SET task_id = (SELECT max(id) FROM task WHERE state = 'split')"
        f" WHERE run_id = 2 AND task_id = ({DONE_SHARD})",
    )
    assert len(violations) == 4 + 3
    assert rebuild_rollups(done) == 7
    assert list(check(done, HASHES)) == []
    assert [rollup(done, run.id) for run in jobs.runs(done, 1)] == before


def test_a_run_whose_outcomes_are_damaged_keeps_its_rollups(done: Database) -> None:
    """There is nothing sound to count."""
    before = rollup(done, 1)
    broken(done, LESS_TOKENS[done.dialect])
    assert rebuild_rollups(done) == 0
    assert rollup(done, 1) == before


def test_scores_at_a_half_are_rounded_as_they_were_written(db: Database) -> None:
    """To the even neighbour; SQLite's own round() goes away from zero, and would find rollups wrong."""
    planned_job(db, 4, policies=["full"], batch_size=4)
    lease = claimed(db)
    made = results_of(db, lease)
    halves = [k * 2.0**-10 for k in (1, 3, -1, -3)]
    scores = [
        ScoreRow(made.outcomes[0].run_id, made.outcomes[i].sample_id, f"m{k}", "v", sign * half)
        for i in range(4)
        for k, half in enumerate(halves)
        for sign in (1, 5)
        if (sign == 1) == (i % 2 == 0)
    ]
    results.commit_shard(db, lease, replace(made, scores=scores))
    assert {score.value * 10**9 % 1 for score in scores} == {0.5}
    assert list(check(db, HASHES)) == []


def test_work_goes_on_while_the_record_is_checked(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that is committed between two statements is not half seen: red on PostgreSQL without the snapshot."""
    for _ in range(2):
        planned_job(db, 23, policies=POLICIES)
    count = recount.recount
    committed = []

    def meanwhile(connection: object, one: object) -> object:
        lease = queue.claim(db, "worker", kind="shard")
        if lease is not None:
            results.commit_shard(db, lease, results_of(db, lease))
            committed.append(lease)
        return count(connection, one)  # type: ignore[arg-type]

    monkeypatch.setattr(recount, "recount", meanwhile)
    assert list(check(db, HASHES)) == []
    assert len(committed) == 4
    work(db)
    assert list(check(db, HASHES)) == []
