"""Opening: fresh, known, older, newer, foreign, out of reach."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from made import planned_job
from sqlalchemy import inspect, text

from db import jobs, schema
from db.errors import BadInput, NewerSchema, OlderSchema, RecordError
from db.reader import VIEWS
from db.session import Database, open_database, upgrade
from db.tables import UNCHECKED_ON_POSTGRESQL, metadata

HEAD = schema.head()
NEXT = f"""
import sqlalchemy as sa
from alembic import op

revision, down_revision = "next", "{HEAD}"


def upgrade():
    op.add_column("job", sa.Column("colour", sa.Text()))
"""


@pytest.fixture
def next_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes this process a Shortstop with one migration more."""

    def install() -> None:
        folder = tmp_path / "db"
        shutil.copytree(Path(schema.__file__).parent / "migrations", folder / "migrations")
        (folder / "migrations" / "versions" / "next_colour.py").write_text(NEXT)
        monkeypatch.setattr(schema, "__file__", str(folder / "schema.py"))
        schema.head.cache_clear()
        schema._scripts.cache_clear()

    yield install
    monkeypatch.undo()
    schema.head.cache_clear()
    schema._scripts.cache_clear()


def revision(db: Database) -> str:
    with db.read() as connection:
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one()


def test_the_migrations_make_the_tables(db: Database) -> None:
    """`db/tables.py` and `db/migrations` say the same, but for what differs by database: the token columns, and what
    outcomes and scores refer to, which PostgreSQL does not look up.
    """
    with db.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        found = compare_metadata(context, metadata)
        views = inspect(connection).get_view_names()
    lacking = [(one[1].parent.name, *one[1].column_keys) for one in found if one[0] == "add_fk"]
    assert set(lacking) == (UNCHECKED_ON_POSTGRESQL if db.dialect == "postgresql" else set())
    assert len(lacking) == len(set(lacking))
    differences = [str(one) for one in found if one[0] != "add_fk"]
    assert [one for one in differences if "remove_column" not in one or "'outcome'" not in one] == []
    assert sorted(views) == sorted([*VIEWS, "score"])


def test_a_fresh_database_opened_by_four_at_once_is_made_once(empty_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(open_database, [empty_url] * 4))
    for database in opened:
        assert jobs.list_jobs(database) == []
        assert revision(database) == schema.head()
        database.close()


def test_nothing_is_made_where_nothing_may_be(empty_url: str) -> None:
    for _ in range(2):
        with pytest.raises(BadInput, match="submit a job first"):
            open_database(empty_url, create=False)


def test_a_newer_schema_is_refused(db: Database, url: str) -> None:
    with db.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for use in (open_database, upgrade):
        with pytest.raises(
            NewerSchema, match="schema 9999, which this version does not know; install a newer Shortstop"
        ):
            use(url)
    assert revision(db) == "9999"


def test_an_older_schema_is_refused_with_the_command_and_upgraded_with_it(db: Database, url: str, next_version) -> None:
    """The upgrade keeps what was there."""
    job_id = planned_job(db)
    next_version()
    with pytest.raises(OlderSchema, match=f"schema {HEAD}, this version needs next; run `shortstop db upgrade` first"):
        open_database(url)
    assert upgrade(url) == (HEAD, "next")
    assert upgrade(url) == ("next", "next")
    newer = open_database(url)
    assert jobs.job(newer, job_id).name == "made"
    newer.close()


def test_a_migration_that_fails_leaves_nothing_behind(db: Database, url: str, next_version, monkeypatch) -> None:
    monkeypatch.setattr(f"{__name__}.NEXT", NEXT + '    op.execute("SELECT * FROM nowhere")\n')
    next_version()
    with pytest.raises(RecordError, match="nowhere"):
        upgrade(url)
    assert revision(db) == HEAD
    with db.read() as connection:
        assert "colour" not in [column["name"] for column in inspect(connection).get_columns("job")]


def test_upgrade_makes_a_record_where_there_is_none(empty_url: str) -> None:
    assert upgrade(empty_url) == (None, schema.head())


def test_somebody_elses_database_is_refused(db: Database, url: str) -> None:
    with db.write() as connection:
        connection.execute(text("DROP TABLE alembic_version"))
    for use in (open_database, upgrade):
        with pytest.raises(BadInput, match="belongs to something else"):
            use(url)


def test_a_password_stays_out_of_messages() -> None:
    with pytest.raises(RecordError) as caught:
        open_database("postgresql+psycopg://user:secret@127.0.0.1:1/none")
    assert caught.value.retryable
    assert "secret" not in str(caught.value)
    assert "user:***@127.0.0.1:1/none is busy or out of reach" in str(caught.value)


def test_what_is_written_is_rolled_back_by_any_error(db: Database) -> None:
    class Interrupted(Exception):
        pass

    def write_and_be_interrupted() -> None:
        with db.write() as connection:
            connection.execute(text("DELETE FROM alembic_version"))
            raise Interrupted

    with pytest.raises(Interrupted):
        write_and_be_interrupted()
    assert revision(db) == schema.head()
