"""Every test here runs against SQLite and against a real PostgreSQL."""

from collections.abc import Iterator

import pytest

from db.session import Database, open_database


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def empty_url(url: str, request: pytest.FixtureRequest) -> str:
    """A place without a record."""
    return url if url.startswith("sqlite") else str(request.getfixturevalue("empty_postgresql_url"))


@pytest.fixture
def db(url: str) -> Iterator[Database]:
    database = open_database(url)
    yield database
    database.close()
