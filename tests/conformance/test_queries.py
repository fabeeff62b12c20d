"""Questions in SQL: answered from the documented views, and nothing can be written or seen beyond them."""

import csv
import json
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from made import planned_job, summarise, work
from typer.testing import CliRunner, Result

from cluster.cli import app
from cluster.parquet import write_parquet
from db import queries, results
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
    assert len(questions) == 11
    for sql in questions:
        assert list(query(filled, sql)), sql
    for view in VIEWS:
        [section] = re.findall(rf"## `{view}`.*?(?=\n## )", page, re.DOTALL)
        with query(filled, f"SELECT * FROM {view}") as answer:
            missing = [column for column in answer.columns if not described(column, section)]
        assert missing == [], view


def asked(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["query", *map(str, arguments)])


ALL = (
    "SELECT policy, exit_layer, draft_layer, draft_kept, confidence, decision FROM token ORDER BY outcome_id, position"
)


def test_every_format_says_the_same(filled: Database, url: str, tmp_path: Path) -> None:
    """Printed or in a file; Parquet with types of its own."""
    rows = list(query(filled, ALL))
    columns = ["policy", "exit_layer", "draft_layer", "draft_kept", "confidence", "decision"]
    mappings = [dict(zip(columns, row, strict=True)) for row in rows]
    for form, read in {
        "json": json.loads,
        "jsonl": lambda text: [json.loads(line) for line in text.splitlines()],
    }.items():
        assert read(asked(ALL, "--database", url, "--format", form).stdout) == mappings
        file = tmp_path / f"answer.{form}"
        assert asked(ALL, "--database", url, "--format", form, "--output", file).stdout == ""
        assert read(file.read_text()) == mappings
    assert json.loads(asked(ALL, "--database", url, "--json").stdout) == mappings
    asked(ALL, "--database", url, "--format", "csv", "--output", tmp_path / "answer.csv")
    assert len(list(csv.DictReader((tmp_path / "answer.csv").read_text().splitlines()))) == len(rows)
    asked(ALL, "--database", url, "--format", "parquet", "--output", tmp_path / "answer.parquet")
    table = pq.read_table(tmp_path / "answer.parquet")
    assert table.to_pylist() == mappings
    assert [str(kind) for kind in table.schema.types[:3]] == ["string", "int64", "int64"]
    assert str(table.schema.field("confidence").type) == "double"
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith(".")) == []


def test_an_empty_answer_is_an_answer_in_every_format(filled: Database, url: str, tmp_path: Path) -> None:
    none = "SELECT policy FROM token WHERE policy = 'nobody'"
    assert json.loads(asked(none, "--database", url, "--format", "json").stdout) == []
    assert asked(none, "--database", url, "--format", "csv").stdout == "policy\n"
    asked(none, "--database", url, "--format", "parquet", "--output", tmp_path / "answer.parquet")
    assert pq.read_table(tmp_path / "answer.parquet").to_pydict() == {"policy": []}


def test_sums_are_integers_on_both_databases(filled: Database, url: str, tmp_path: Path) -> None:
    """PostgreSQL's driver gives decimals: 42, not 42.0, in every format."""
    sums = "SELECT sum(drafted) AS n, avg(drafted) AS mean FROM batch WHERE policy LIKE 'self%'"
    assert asked(sums, "--database", url, "--format", "csv").stdout == "n,mean\n42,7.0\n"
    assert asked(sums, "--database", url, "--format", "jsonl").stdout == '{"n": 42, "mean": 7.0}\n'
    asked(sums, "--database", url, "--format", "parquet", "--output", tmp_path / "answer.parquet")
    assert [str(kind) for kind in pq.read_table(tmp_path / "answer.parquet").schema.types] == ["int64", "double"]


def test_a_parquet_column_gets_the_type_that_holds_all_its_rows(tmp_path: Path) -> None:
    """What comes late counts: floats among integers, text among numbers, integers beyond 64 bits."""
    late = [(None, 1, 1, 1, True, None)] * 25_000 + [(None, 2.5, "two", 2**70, None, b"x")]
    write_parquet(tmp_path / "answer.parquet", list("abcdef"), late)
    table = pq.read_table(tmp_path / "answer.parquet")
    assert [str(kind) for kind in table.schema.types] == ["string", "double", "string", "string", "bool", "binary"]
    assert table.slice(25_000).to_pylist() == [{"a": None, "b": 2.5, "c": "two", "d": str(2**70), "e": None, "f": b"x"}]
    assert table.num_rows == 25_001


MANY = "SELECT a.position, a.confidence FROM token AS a, token AS b, token AS c"


def test_an_answer_is_streamed(filled: Database, url: str, tmp_path: Path) -> None:
    """A hundred thousand rows in a few megabytes: red where the rows are gathered first."""
    for form in ("csv", "jsonl", "json", "parquet"):
        file = tmp_path / f"answer.{form}"
        to_file = ("--database", url, "--format", form, "--output", file, "--timeout", 600)
        asked(MANY, *to_file, "--limit", 1)  # what is imported for it is no part of the answer
        tracemalloc.start()
        done = asked(MANY, *to_file, "--limit", 100_000)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert done.exit_code == 0, done.stderr
        assert peak < 6e6, form


def test_a_limit_ends_an_answer(filled: Database, url: str) -> None:
    for limit in (1, 999, 1000, 1001, 2500):
        assert len(asked(MANY, "--database", url, "--format", "csv", "--limit", limit).stdout.splitlines()) == limit + 1


def test_an_answer_that_breaks_off_leaves_no_file(filled: Database, url: str, tmp_path: Path) -> None:
    """What was there before stays."""
    file = tmp_path / "answer.csv"
    file.write_text("before")
    slow = MANY + ", token AS d, token AS e"
    done = asked(slow, "--database", url, "--format", "csv", "--timeout", 0.5, "--output", file)
    assert (done.exit_code, "took longer than 0.5 s" in done.stderr) == (2, True)
    assert file.read_text() == "before"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["answer.csv"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "parquet"], "format parquet is no text; name a file with --output"),
        (["--output", "answer"], "output 'answer': a table is for the screen; choose --format csv"),
        (["--format", "csv", "--output", "nowhere/answer"], "there is no folder"),
    ],
)
def test_outputs_that_cannot_be_are_refused(filled: Database, url: str, options: list[str], message: str) -> None:
    done = asked("SELECT policy FROM token", "--database", url, *options)
    assert (done.exit_code, message in done.stderr) == (2, True)


def test_the_file_is_opened_read_only(tmp_path: Path) -> None:
    """Not by the authorizer alone: SQLite itself refuses to write, also where the authorizer is taken away."""
    db = open_database(f"sqlite:///{tmp_path / 'record.db'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queries, "_authorizer", lambda connection: None)
        with pytest.raises(BadInput, match="may only read the views"):
            list(query(db, "DELETE FROM job RETURNING id"))
    db.close()


def test_on_postgresql_a_question_is_asked_under_the_role(
    filled: Database, url: str, request: pytest.FixtureRequest
) -> None:
    """So that no function reaches what the connected user could; and in a transaction that cannot write."""
    if filled.dialect == "sqlite":
        pytest.skip("SQLite knows no roles")
    sql = "SELECT current_user, current_setting('transaction_read_only'), current_setting('statement_timeout')"
    assert list(query(filled, sql, timeout_s=7)) == [("shortstop_reader", "on", "7s")]


def described(column: str, section: str) -> bool:
    return f"`{column}`" in section or (column.endswith(("_low", "_high")) and "`…_low`, `…_high`" in section)
