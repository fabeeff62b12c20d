"""A record that an older version wrote, brought up to date: what it held is there, and work goes on in it."""

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from alembic import command
from made import planned_job, work
from sqlalchemy import make_url

from db import devices, jobs, results, schema
from db.queries import query
from db.rollups import rollup
from db.session import Database, open_database, upgrade

#: a finished job of two samples as version 0001 wrote it, but for the tokens, and a view that a user made over ours
ROWS = """
INSERT INTO job VALUES (1, 'old', '{}', 'done', 0, '{"batch_size": 2, "n_layers": 30}', NULL, 1.5, 2.5, 3.5);
INSERT INTO benchmark VALUES (1, 'lines', '1', 'hash', true, 2, '[]');
INSERT INTO sample VALUES (1, 1, 0, 's/0', 'p', 'r', 'python', 'g'), (2, 1, 1, 's/1', 'p', 'r', 'python', 'g');
INSERT INTO run VALUES (1, 1, 0, 1, 'lines', 'sec', 'sec', '{"sec": {}}', 1, '{"samples": 2, "tokens": 2}');
INSERT INTO run VALUES (2, 1, 1, 1, 'lines', 'full', 'full', '{"full": {}}', 1, NULL);
INSERT INTO task VALUES
  (1, 1, 'shard', 'done', 0, 1, 1, 'w', NULL, 1.5, NULL, 1, 0, 1, 1, NULL, 0, NULL, NULL, '[]');
INSERT INTO outcome
  (id, run_id, sample_id, task_id, text, error, finish, n_tokens, prompt_tokens, cut_tokens, shown, isolated)
  VALUES (1, 1, 1, 1, 'ab', NULL, 'stop', 2, 7, 0, true, false),
    (2, 1, 2, 1, NULL, 'it broke', NULL, 0, 7, 0, false, false);
INSERT INTO score VALUES (1, 1, 1, 'es', 'es@test-1', 0.5), (1, 1, 1, 'em', 'em@test-1', 0.30000000000000004),
  (1, 2, 1, 'em', 'em@test-1', 1), (1, 2, 1, 'es', 'es@test-2', 1e-17), (2, 1, 1, 'em', 'em@test-1', 0),
  (2, 1, 1, 'es', 'es@test-1', 1), (2, 1, 2, 'es', 'es@test-1', 0.1);
INSERT INTO timing VALUES (1, 0, 2, 10, 20, 1, 30, 5, 'cpu-test', true);
INSERT INTO rollup VALUES (1, 1, 2, 1, 1, 0, 0, 2, 1, 1, 1, 48, 48, 12, 1, 0, 10, 20, 1, 5, 30, '{"18": 1, "30": 1}',
  '{"12": 1}', '{"es": 1}', '{"es": 500000000}');
INSERT INTO device_class VALUES ('cpu-test', '{"peak": 1.0, "bandwidth": 2.0}', 1.5);
CREATE VIEW somebody_elses AS SELECT count(*) AS tokens FROM token;
CREATE VIEW somebody_elses_too AS SELECT count(*) AS scores FROM completion_score
"""
TOKENS = {
    "sqlite": "UPDATE outcome SET tokens = '[[5,30,30,0,0.5],[6,18,18,1,null],[-1,12,12,2,0.25]]' WHERE id = 1",
    "postgresql": """
        UPDATE outcome SET token_ids = '{5, 6, -1}', exit_layers = '{30, 18, 12}', layers_run = '{30, 18, 12}',
          decisions = '{0, 1, 2}', confidences = '{0.5, NaN, 0.25}' WHERE id = 1""",
}
#: on PostgreSQL the rows above took numbers that the sequences do not know of
SEQUENCES = "SELECT setval(pg_get_serial_sequence('{0}', 'id'), max(id)) FROM {0}"


@pytest.fixture
def first_version(empty_url: str) -> str:
    """The URL of a record of version 0001."""
    with closing(Database(make_url(empty_url))) as db, db.write() as connection:
        config = schema._config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        for statement in [*ROWS.split(";\n"), TOKENS[db.dialect]]:
            connection.exec_driver_sql(statement)
        if db.dialect == "postgresql":
            for table in ("job", "benchmark", "sample", "run", "task", "outcome"):
                connection.exec_driver_sql(SEQUENCES.format(table))
    return empty_url


@pytest.fixture
def upgraded(first_version: str) -> Iterator[Database]:
    assert upgrade(first_version) == ("0001", schema.head())
    with closing(open_database(first_version)) as db:
        yield db


def test_tokens_of_the_first_version_are_read_as_before(upgraded: Database) -> None:
    """Arrays and view: every value as it was written, and none was a draft."""
    [completion, error] = results.completions(upgraded, run_id=1)
    tokens = completion.outcome.tokens
    assert tokens is not None
    assert (tokens.token_ids.tolist(), tokens.exit_layers.tolist()) == ([5, 6, -1], [30, 18, 12])
    assert tokens.drafts.tolist() == [0, 0, 0]
    np.testing.assert_array_equal(tokens.confidences, np.array([0.5, np.nan, 0.25], np.float32))
    assert (completion.outcome.text, completion.scores) == ("ab", {"em": 0.1 + 0.2, "es": 0.5})
    assert (error.outcome.error, error.outcome.tokens) == ("it broke", None)
    columns = "position, token_id, exit_layer, layers_run, decision, confidence, draft_layer, draft_kept"
    assert list(query(upgraded, f"SELECT {columns} FROM token ORDER BY position")) == [
        (1, 5, 30, 30, "full", 0.5, None, None),
        (2, 6, 18, 18, "exit", None, None, None),
        (3, None, 12, 12, "stop", 0.25, None, None),
    ]


def test_sums_of_the_first_version_count_no_drafts(upgraded: Database) -> None:
    """Zero, not unknown: nothing was ever drafted. A run without a summary still has no figures."""
    sums = rollup(upgraded, 1)
    assert (sums.tokens, sums.exit_histogram, sums.drafted, sums.drafts_kept) == (2, {18: 1, 30: 1}, 0, 0)
    [row] = query(upgraded, "SELECT decode_ns, device_class, drafted, drafts_kept FROM batch")
    assert row == (20, "cpu-test", 0, 0)
    rows = query(upgraded, "SELECT run_id, samples, tokens, drafted, drafts_kept FROM run_summary ORDER BY run_id")
    assert list(rows) == [(1, 2, 2, 0, 0), (2, None, None, None, None)]
    assert devices.kernels_of(upgraded, 1) == {}
    assert devices.device_plan(upgraded, "cpu-test", lambda: pytest.fail("measured twice"))["peak"] == 1.0


def test_views_over_ours_survive(upgraded: Database) -> None:
    """Red on PostgreSQL where a view is dropped instead of replaced."""
    with upgraded.read() as connection:
        assert connection.exec_driver_sql("SELECT tokens FROM somebody_elses").scalar_one() == 3
        assert connection.exec_driver_sql("SELECT scores FROM somebody_elses_too").scalar_one() == 5


def test_scores_of_the_first_version_are_what_they_were(upgraded: Database) -> None:
    """Of every revision, to the last digit; a list of metrics stands once."""
    with upgraded.read() as connection:
        rows = connection.exec_driver_sql("SELECT * FROM score ORDER BY 1, 2, 3, 4").all()
        lists = connection.exec_driver_sql("SELECT count(DISTINCT list_id), count(*) FROM metric_list").one()
    assert [tuple(row) for row in rows] == [
        (1, 1, 1, "em", "em@test-1", 0.1 + 0.2),
        (1, 1, 1, "es", "es@test-1", 0.5),
        (1, 2, 1, "em", "em@test-1", 1.0),
        (1, 2, 1, "es", "es@test-2", 1e-17),
        (2, 1, 1, "em", "em@test-1", 0.0),
        (2, 1, 1, "es", "es@test-1", 1.0),
        (2, 1, 2, "es", "es@test-1", 0.1),
    ]
    assert tuple(lists) == (3, 5)


def test_work_goes_on_after_an_upgrade(upgraded: Database) -> None:
    """Drafts are written beside what is there."""
    job_id = planned_job(upgraded, 11, policies=["self-speculative"])
    work(upgraded)
    [run] = jobs.runs(upgraded, job_id)
    kept = [row.outcome.tokens.drafts for row in results.completions(upgraded, run_id=run.id) if row.outcome.tokens]
    drafted = sum(int((drafts != 0).sum()) for drafts in kept)
    assert drafted > 0
    counted = "SELECT count(draft_layer), count(*) FROM token WHERE draft_layer IS NOT NULL"
    assert list(query(upgraded, counted)) == [(drafted, drafted)]
