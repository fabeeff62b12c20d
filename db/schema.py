"""The schema's version: checked at every opening, changed by migrations only."""

from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Select, column, inspect, select, table

from db.errors import BadInput, NewerSchema, OlderSchema
from db.reader import grant_reader

#: Alembic keeps the migration that runs in a global
_one_at_a_time = Lock()


def check(connection: Connection, shown: str) -> bool:
    """True: up to date. False: fresh, without any table. Raises `OlderSchema`, `NewerSchema`, `BadInput`."""
    found = _revision(connection)
    if found == head():
        return True
    if found is None:
        _refuse_strangers(connection, shown)
        return False
    _refuse_newer(found, shown)
    raise OlderSchema(
        f"database {shown} has schema {found}, this version needs {head()}; run `shortstop db upgrade` first."
    )


def hold(connection: Connection) -> None:
    """See that the schema is still this version's; a migration waits until the transaction has ended.

    For transactions of processes that may outlive an upgrade. Raises as `check` does.
    """
    if connection.execute(_HELD).scalar_one_or_none() != head():
        check(connection, connection.engine.url.render_as_string(hide_password=True))


_WRITTEN: Select[Any] = select(column("version_num")).select_from(table("alembic_version"))
#: the lock that a foreign key takes: all who hold the schema share it
_HELD = _WRITTEN.with_for_update(read=True, key_share=True)


def migrate(connection: Connection, shown: str) -> tuple[str | None, str]:
    """Run the missing migrations inside the caller's transaction. Returns the revision before and after."""
    found = _revision(connection)
    if found is None:
        _refuse_strangers(connection, shown)
    else:
        _refuse_newer(found, shown)
        # first of all: one who holds the schema may still need a table that a migration would lock
        connection.execute(_WRITTEN.with_for_update())
    config = _config()
    config.attributes["connection"] = connection
    with _one_at_a_time:
        command.upgrade(config, "head")
    if connection.dialect.name == "postgresql":
        grant_reader(connection)
    return found, head()


@cache
def head() -> str:
    """The newest revision this version knows."""
    revision = _scripts().get_current_head()
    assert revision is not None
    return revision


def _refuse_newer(found: str, shown: str) -> None:
    if found not in {script.revision for script in _scripts().walk_revisions()}:
        raise NewerSchema(
            f"database {shown} has schema {found}, which this version does not know; install a newer Shortstop."
        )


def _refuse_strangers(connection: Connection, shown: str) -> None:
    tables = inspect(connection).get_table_names()
    if set(tables) - {"alembic_version"}:
        raise BadInput(f"database {shown} belongs to something else (table {sorted(tables)[0]!r}); name another one.")


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


@cache
def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config
