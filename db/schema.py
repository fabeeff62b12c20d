"""The schema's version: checked at every opening, changed by migrations only."""

from functools import cache
from pathlib import Path
from threading import Lock

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

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


def migrate(connection: Connection, shown: str) -> tuple[str | None, str]:
    """Run the missing migrations inside the caller's transaction. Returns the revision before and after."""
    found = _revision(connection)
    if found is None:
        _refuse_strangers(connection, shown)
    else:
        _refuse_newer(found, shown)
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
