"""Questions in SQL: answered from the documented views, and nothing can be written or seen beyond them."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from made import planned_job, summarise, work

from db import results
from db.errors import BadInput
from db.queries import query
from db.reader import VIEWS
from db.session import Database, open_database
from db.tables import metadata

POLICIES = ("full", "confidence threshold=0.9", "self-speculative exit_layer=18")
FOREVER = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One record for all questions: they cannot change it."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path_factory.mktemp('queries') / 'record.db'}"
        return
    with request.getfixturevalue("new_postgresql_url")() as fresh:
        yield fresh


@pytest.fixture(scope="module")
def filled(url: str) -> Iterator[Database]:
    db = open_database(url)
    job_id = planned_job(db, policies=POLICIES)
    work(db)
    results.finalise(db, job_id, summary)
    yield db
    db.close()


def summary(data) -> dict:
    drafts = {"drafted": data.drafted, "drafts_kept": data.drafts_kept} if data.drafted else {}
    return summarise(data) | {"speedup_token": {"value": 1.5, "low": 1, "high": 2}} | drafts


def fingerprint(db: Database) -> dict[str, list]:
    with db.read() as connection:
        return {table.name: connection.execute(table.select()).all() for table in metadata.sorted_tables}


def test_answers_have_columns_and_rows(filled: Database, url: str) -> None:
    sql = "select decision, exit_layer, count(*) as n from token group by 1, 2 order by 1, 2;"
    answer = query(filled, sql)
    assert answer.columns == ["decision", "exit_layer", "n"]
    rows = list(answer)
    counted = {}
    for batch in results.tokens(filled, job_id=1):
        for key in zip(batch.decision.tolist(), batch.exit_layer.tolist(), strict=True):
            counted[key] = counted.get(key, 0) + 1
    assert rows == [(*key, n) for key, n in sorted(counted.items())]
    assert list(query(url, sql)) == rows, "by URL as well"
    with query(filled, sql, limit=2) as limited:
        assert list(limited) == rows[:2]


def test_every_view_answers(filled: Database) -> None:
    for view, rows in [("completion", 33), ("completion_score", 66), ("batch", 18), ("run_summary", 3)]:
        assert list(query(filled, f"select count(*) from {view}")) == [(rows,)]
    columns = "job, state, policy, samples, speedup_token, speedup_token_high, tokens"
    sql = f"select {columns} from run_summary where run_id = 1"
    assert list(query(filled, sql)) == [("made", "done", "full", 11, 1.5, 2.0, None)]
    drafts = "select drafted, drafts_kept from run_summary order by run_id"
    assert list(query(filled, drafts)) == [(0, 0), (0, 0), (42, 21)]
    per_run = "select sum(drafted) as d, sum(drafts_kept) as k from batch group by run_id order by run_id"
    assert list(query(filled, per_run)) == [(0, 0), (0, 0), (42, 21)]


def test_common_table_expressions_and_comments_are_welcome(filled: Database) -> None:
    sql = """-- which policies
        /* are there */ WITH p AS (SELECT DISTINCT policy FROM completion WHERE text LIKE '%text%')
        SELECT count(*) FROM (SELECT p.policy FROM p JOIN run_summary USING (policy)) AS q"""
    assert list(query(filled, sql)) == [(3,)]


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO idle_worker VALUES ('w', 0)",
        "UPDATE run SET policy = 'x'",
        "DELETE FROM outcome",
        "DROP VIEW token",
        "CREATE TABLE t (i INT)",
        "DELETE FROM token RETURNING 1",
        "VACUUM",
        "BEGIN",
        "COMMIT",
        "SELECT 1; DELETE FROM outcome",
        "SELECT 1; COMMIT; DELETE FROM outcome",
        "WITH gone AS (DELETE FROM outcome RETURNING 1) SELECT * FROM gone",
        "PRAGMA journal_mode = DELETE",
        "ATTACH 'other.db' AS other",
        "SET ROLE NONE",
        "COPY outcome TO STDOUT",
        "EXPLAIN ANALYZE DELETE FROM outcome",
        "SELECT spec FROM job",
        "SELECT count(*) FROM task",
        "SELECT text FROM outcome",
        "WITH token AS (SELECT spec FROM job) SELECT * FROM token",
        "SELECT * FROM completion JOIN job ON job.id = completion.job_id",
        "SELECT (SELECT max(pinned) FROM job) FROM token",
        "SELECT set_config('role', 'none', true), query_to_xml('SELECT * FROM job', true, true, '')",
        "SELECT * FROM no_such_table",
        "SELECT no_such_column FROM token",
        "SELEC 1",
        "SELECT",
        "",
        "-- nothing",
    ],
)
def test_everything_but_a_select_on_the_views_is_refused(filled: Database, sql: str) -> None:
    """One sentence, and the record is as it was."""
    before = fingerprint(filled)
    with pytest.raises(BadInput) as caught:
        list(query(filled, sql))
    assert "\n" not in str(caught.value)
    assert fingerprint(filled) == before


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("DELETE FROM outcome", "may only read the views token, completion"),
        ("SELECT spec FROM job", "may only read the views token, completion"),
        ("SELECT 1; SELECT 2", "more than one statement"),
        ("SELECT no_such_column FROM token", "the SQL is wrong: .*no_such_column"),
        ("SELEC 1", "."),
    ],
)
def test_refusals_say_why(filled: Database, sql: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        query(filled, sql)


def test_a_question_that_takes_too_long_is_ended(filled: Database) -> None:
    with pytest.raises(BadInput, match=r"took longer than 0.2 s; narrow it"):
        list(query(filled, FOREVER, timeout_s=0.2))


def test_a_question_does_not_wait_for_a_writer(filled: Database) -> None:
    with filled.write() as connection:
        connection.execute(metadata.tables["run"].update().values(benchmark="half done"))
        assert list(query(filled, "select count(*) from completion where benchmark = 'lines'", timeout_s=2)) == [(33,)]
        connection.rollback()


def test_the_documented_questions_and_columns_are_right(filled: Database) -> None:
    """docs/sql.md: each question runs on both databases, and each column of each view is described."""
    page = (Path(__file__).parents[2] / "docs" / "sql.md").read_text()
    questions = re.findall(r"```sql\n(.*?)```", page, re.DOTALL)
    assert len(questions) == 6
    for sql in questions:
        assert list(query(filled, sql)), sql
    for view in VIEWS:
        [section] = re.findall(rf"## `{view}`.*?(?=\n## )", page, re.DOTALL)
        with query(filled, f"SELECT * FROM {view}") as answer:
            missing = [column for column in answer.columns if not described(column, section)]
        assert missing == [], view


def described(column: str, section: str) -> bool:
    return f"`{column}`" in section or (column.endswith(("_low", "_high")) and "`…_low`, `…_high`" in section)
