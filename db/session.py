"""Opening a database: one URL in, short read and write transactions out."""

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from db import schema
from db.errors import BadInput, Missing, RecordError, Unavailable

#: how long a statement waits for a lock; well under a lease of 30 s
BUSY_SECONDS = 5
#: how long PostgreSQL waits in the middle of a transaction for a client that says nothing: it may be frozen, and holds
#: its shard until then
FROZEN_SECONDS = 60
#: libpq: a server that is gone without a word (its machine, or the network between) is noticed within a minute
_KEEPALIVES = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000}

#: sqlite3's result codes for a database that is locked, full or out of reach
_SQLITE_AWAY = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
}
#: SQLSTATE classes of PostgreSQL: connection, transaction rollback, resources, intervention, lock not available,
#: ended because the client was silent
_POSTGRESQL_AWAY = ("08", "40", "53", "57", "55P03", "25P03")
_POSTGRESQL_FULL = "53100"


class Database:
    """An open record. Safe to share among threads, not among processes: each process opens its own."""

    def __init__(self, url: URL, *, patient: bool = False) -> None:
        """patient: see `open_database`."""
        self.url = url.render_as_string(hide_password=False)
        self.dialect = url.get_backend_name()  #: "sqlite" or "postgresql"
        self.shown = url.render_as_string(hide_password=True)  #: for messages
        self._engine = _engine(url, patient)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A write transaction: committed at the end, rolled back by any exception. Raises `Unavailable`."""
        with self._transaction("BEGIN IMMEDIATE") as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A read transaction. Raises `Unavailable`."""
        with self._transaction("BEGIN") as connection:
            yield connection

    def lasting_connection(self) -> Connection:
        """A connection without a transaction, for what PostgreSQL ties to one. Invalidate and close it at the end.

        Raises `Unavailable`.
        """
        with self._translated():
            return self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[Connection]:
        with self._translated(), self._engine.connect() as connection:
            connection = connection.execution_options(begin=begin)
            with connection.begin():
                yield connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turns what the driver raises into a `RecordError`."""
        try:
            yield
        except _driver_errors(self.dialect) as error:
            raise explained(error, self.shown) from error


def open_database(url: str, *, create: bool = True, patient: bool = False) -> Database:
    """Open the record at `sqlite:///file` or `postgresql+psycopg://...`.

    A fresh database gets its tables (create=False: is refused). patient: the caller repeats what was `Unavailable`, so
    no connection is asked before each use whether it lives, which costs a round trip. Raises `BadInput` for a URL, a
    folder or a file that cannot be used, `OlderSchema`, `NewerSchema`, `Unavailable`.
    """
    database = _connect(url, create=create, patient=patient)
    try:
        with database.read() as connection:
            known = schema.check(connection, database.shown)
        if not known:
            if not create:
                raise Missing(f"database {database.shown} holds no record; submit a job first or name another one.")
            _migrate(database, only_fresh=True)
    except BaseException:
        database.close()
        raise
    return database


def upgrade(url: str) -> tuple[str | None, str]:
    """Bring a database up to date. Returns the schema's revision before and after. Raises as `open_database` does."""
    database = _connect(url, create=True)
    try:
        return _migrate(database, only_fresh=False)
    finally:
        database.close()


def _migrate(database: Database, *, only_fresh: bool) -> tuple[str | None, str]:
    with database.write() as connection:
        if database.dialect == "postgresql":  # two processes that find the database fresh take turns
            connection.execute(text("SELECT pg_advisory_xact_lock(5740737)"))
        if only_fresh and schema.check(connection, database.shown):
            return schema.head(), schema.head()
        return schema.migrate(connection, database.shown)


def _connect(url: str, *, create: bool, patient: bool = False) -> Database:
    """Open without looking at the schema."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise BadInput(f"database {url!r} is no URL; write it like sqlite:///shortstop.db.") from None
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        _prepare_file(parsed, create=create)
    elif backend != "postgresql":
        raise BadInput(f"database {url!r}: {backend!r} is not supported; use sqlite:/// or postgresql+psycopg://.")
    elif parsed.drivername != "postgresql+psycopg":
        parsed = parsed.set(drivername="postgresql+psycopg")
    try:
        return Database(parsed, patient=patient)
    except ImportError:
        raise BadInput(f"database {url!r} needs the package psycopg; install shortstop[postgres].") from None


def _prepare_file(url: URL, *, create: bool) -> None:
    """Make the folder of a SQLite file, and its write-ahead log, so that readers and the writer do not wait."""
    if url.database in (None, "", ":memory:"):
        raise BadInput(
            f"database {url}: a record in memory cannot be shared; name a file, like sqlite:///shortstop.db."
        )
    file = Path(str(url.database))
    if not create and not file.exists():
        raise Missing(f"database file {str(file)!r} does not exist; submit a job first or name another file.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = not file.exists() or file.stat().st_size == 0
        connection = sqlite3.connect(file, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            # The mode stays with the file. One that is there may be somebody else's: it is read, never changed.
            _switch_to_wal(connection) if fresh else connection.execute("PRAGMA schema_version").fetchone()
        finally:
            connection.close()
    except OSError as error:
        raise BadInput(
            f"database folder {str(file.parent)!r} cannot be written ({error.strerror}); name another one."
        ) from None
    except sqlite3.Error as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL):
            raise Unavailable(f"database file {str(file)!r} is busy or its disk full ({error}); try again.") from None
        raise BadInput(f"database file {str(file)!r} cannot be used ({error}); name another one.") from None


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """The switch ignores the busy timeout, so two processes opening one fresh file would collide without the retry."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _engine(url: URL, patient: bool) -> Engine:
    strict_json = partial(json.dumps, allow_nan=False)  # PostgreSQL has no NaN in JSON; SQLite shall not either
    if url.get_backend_name() == "postgresql":
        engine = create_engine(
            url,
            json_serializer=strict_json,
            pool_pre_ping=not patient,
            connect_args={"connect_timeout": 10, "application_name": "shortstop"} | _KEEPALIVES,
        )
        event.listen(engine, "connect", _set_up_postgresql)
        return engine
    engine = create_engine(url, json_serializer=strict_json)
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_postgresql(connection: Any, _: Any) -> None:
    connection.execute(f"SET idle_in_transaction_session_timeout = '{FROZEN_SECONDS}s'")
    connection.commit()


def _set_up_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions are begun by `_begin_sqlite`, not by the driver
    connection.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = NORMAL")


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))


def _driver_errors(dialect: str) -> tuple[type[Exception], ...]:
    """What SQLAlchemy raises, and the driver beneath it."""
    if dialect == "sqlite":
        return (SQLAlchemyError, sqlite3.Error)
    import psycopg  # an extra: SQLite needs no driver

    return (SQLAlchemyError, psycopg.Error)


def explained(error: Exception, shown: str) -> RecordError:
    """What SQLAlchemy or the driver raised, as one of ours."""
    cause = getattr(error, "orig", None) or error
    complaint = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    if _full(cause):
        return Unavailable(f"database {shown} has no space left ({complaint}); make room and try again.")
    if isinstance(error, PoolTimeout) or _away(cause):
        return Unavailable(f"database {shown} is busy or out of reach ({complaint}); try again.")
    if getattr(cause, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_READONLY:
        return BadInput(f"database {shown} cannot be written; change its permissions or name another one.")
    return RecordError(f"database {shown} refused: {complaint}")


def _full(cause: BaseException) -> bool:
    if isinstance(cause, sqlite3.Error):
        return getattr(cause, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
    return getattr(cause, "sqlstate", None) == _POSTGRESQL_FULL


def _away(cause: BaseException) -> bool:
    """Whether the driver says that the database is locked or out of reach."""
    if isinstance(cause, sqlite3.Error):
        return getattr(cause, "sqlite_errorcode", 0) & 0xFF in _SQLITE_AWAY
    if isinstance(cause, SQLAlchemyError):
        return False
    state = getattr(cause, "sqlstate", None)
    if state is None:  # psycopg lost the connection, or never had one; or it refuses a value, which no repeat mends
        import psycopg  # an extra: SQLite needs no driver

        return isinstance(cause, psycopg.OperationalError | psycopg.InterfaceError)
    return str(state).startswith(_POSTGRESQL_AWAY)
