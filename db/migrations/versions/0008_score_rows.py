"""The scores of a completion in one row instead of a row each: of a commit on PostgreSQL they were half.

`score` is a view now, with the columns that the table had.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0008"
down_revision = "0007"

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    on_sqlite = op.get_bind().dialect.name == "sqlite"
    create_tables(on_sqlite)
    copy_on_sqlite() if on_sqlite else copy_on_postgresql()
    value = VALUE_ON_SQLITE if on_sqlite else VALUE_ON_POSTGRESQL
    if on_sqlite:
        op.execute("DROP VIEW completion_score")
        op.execute(f"CREATE VIEW completion_score AS {COMPLETION_SCORE.format(value)}")
    else:  # which keeps the view so, and what was granted on it
        op.execute(f"CREATE OR REPLACE VIEW completion_score AS {COMPLETION_SCORE.format(value)}")
    op.drop_table("score")
    op.execute(f"CREATE VIEW score AS {SCORE.format(value)}")


def create_tables(on_sqlite: bool) -> None:
    op.create_table(
        "metric_list",
        sa.Column("list_id", sa.BigInteger(), nullable=False),
        sa.Column("place", sa.Integer(), nullable=False),
        sa.Column("metric", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("list_id", "place", name="pk_metric_list"),
    )
    references = [
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_score_row_run_id"),
        sa.ForeignKeyConstraint(["sample_id"], ["sample.id"], name="fk_score_row_sample_id"),
    ]
    op.create_table(
        "score_row",
        sa.Column("run_id", ID, nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("sample_id", ID, nullable=False),
        sa.Column("list_id", sa.BigInteger(), nullable=False),
        sa.Column("scores", postgresql.ARRAY(sa.Double()).with_variant(sa.JSON(), "sqlite"), nullable=False),
        *(references if on_sqlite else []),
        sa.PrimaryKeyConstraint("run_id", "revision", "sample_id", name="pk_score_row"),
        sqlite_with_rowid=False,
    )


# --- what is there ---------------------------------------------------------------------------------------------------

#: the number that a list of metrics has is of its content; any that no other list has will do
ROWS_ON_POSTGRESQL = """
INSERT INTO score_row (run_id, revision, sample_id, list_id, scores)
SELECT run_id, revision, sample_id,
  ('x' || left(md5(array_agg(ARRAY[metric, version] ORDER BY metric)::text), 16))::bit(64)::bigint,
  array_agg(value ORDER BY metric)
FROM score GROUP BY run_id, revision, sample_id
"""
LISTS_ON_POSTGRESQL = """
INSERT INTO metric_list (list_id, place, metric, version)
SELECT one.list_id, row_number() OVER (PARTITION BY one.list_id ORDER BY s.metric), s.metric, s.version
FROM (SELECT DISTINCT ON (list_id) list_id, run_id, revision, sample_id FROM score_row ORDER BY list_id) one
  JOIN score s USING (run_id, revision, sample_id)
"""


def copy_on_postgresql() -> None:
    op.execute(ROWS_ON_POSTGRESQL)
    op.execute(LISTS_ON_POSTGRESQL)


def copy_on_sqlite() -> None:
    """Through Python: SQLite of that time wrote no number into JSON with more than fifteen digits."""
    connection: Any = op.get_bind().connection.driver_connection
    lists: dict[int, list[tuple[str, str]]] = {}
    insert = "INSERT INTO score_row (run_id, revision, sample_id, list_id, scores) VALUES (?, ?, ?, ?, ?)"
    connection.executemany(insert, rows_on_sqlite(connection, lists))
    connection.executemany(
        "INSERT INTO metric_list (list_id, place, metric, version) VALUES (?, ?, ?, ?)",
        [(key, place, *one) for key, metrics in lists.items() for place, one in enumerate(metrics, 1)],
    )


def rows_on_sqlite(connection: Any, lists: dict[int, list[tuple[str, str]]]) -> Iterator[tuple[Any, ...]]:
    """Notes the lists of metrics that it meets."""
    columns = "run_id, revision, sample_id, metric, version, value"
    found = connection.execute(f"SELECT {columns} FROM score ORDER BY run_id, revision, sample_id, metric")
    for key, scores in groupby(found, key=lambda row: row[:3]):
        kept = list(scores)
        metrics = [(row[3], row[4]) for row in kept]
        digest = hashlib.sha256(json.dumps(metrics).encode()).digest()
        list_id = int.from_bytes(digest[:8], "big", signed=True)
        lists[list_id] = metrics
        yield (*key, list_id, json.dumps([row[5] for row in kept]))


# --- views -----------------------------------------------------------------------------------------------------------

VALUE_ON_SQLITE = "json_extract(c.scores, '$[' || (m.place - 1) || ']')"
VALUE_ON_POSTGRESQL = "c.scores[m.place]"

SCORE = """
SELECT c.run_id, c.revision, c.sample_id, m.metric, m.version, {} AS value
FROM score_row c JOIN metric_list m ON m.list_id = c.list_id
"""
# not over `score`: whoever asks may read what this view names
COMPLETION_SCORE = """
SELECT r.job_id, c.run_id, r.policy, r.benchmark, c.sample_id, m.metric, m.version, {} AS value
FROM score_row c JOIN run r ON r.id = c.run_id AND r.score_revision = c.revision
  JOIN metric_list m ON m.list_id = c.list_id
"""
