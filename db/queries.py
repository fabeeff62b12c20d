"""Questions in SQL: read-only by construction, over the documented views only (docs/sql.md).

SQLite: the file is opened read-only, and an authorizer allows nothing but reading what the views show, through them.
PostgreSQL: a connection of its own with one READ ONLY transaction, never committed; the question becomes a cursor,
which takes a single SELECT and nothing else; a statement timeout; the role of `db.reader`, where it could be made.
"""

import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from sqlalchemy import make_url

from db.errors import BadInput, RecordError
from db.reader import READER, VIEWS
from db.session import BUSY_SECONDS, Database, explained, open_database

if TYPE_CHECKING:
    import psycopg
    from psycopg.abc import Buffer, Loader

#: steps of SQLite's virtual machine between two looks at the clock
_STEPS = 20_000
#: rows fetched at once
_FETCH = 1_000

#: functions of PostgreSQL that put the role back or run SQL of their own, and the escape that would hide their names
_AROUND_THE_ROLE = re.compile(r"set_config|query_to_xml|cursor_to_xml|ts_stat|ts_rewrite|\bu&[\"']", re.IGNORECASE)
#: how a question begins, after comments
_QUESTION = re.compile(r"(\s|--[^\n]*\n|/\*.*?\*/)*(\(|select\b|with\b|values\b|table\b)", re.IGNORECASE | re.DOTALL)

Row = tuple[Any, ...]


class Result:
    """The answer to a query. Iterate once; `close` (or a `with` block) lets go of the database before the last row."""

    def __init__(self, columns: list[str], rows: Iterator[Row], close: Callable[[], None]) -> None:
        self.columns = columns
        self.rows = rows
        self.close = close

    def __iter__(self) -> Iterator[Row]:
        return self.rows

    def __enter__(self) -> "Result":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def query(source: str | Database, sql: str, *, timeout_s: float = 30, limit: int | None = None) -> Result:
    """Ask one SELECT. limit: rows after which the answer ends.

    Raises `BadInput`, one sentence, for SQL that is wrong, writes, reads something undocumented or takes too long (the
    last also while rows are read), and what `open_database` raises.
    """
    if isinstance(source, str):
        source = open_database(source, create=False)
        source.close()
    if source.dialect == "sqlite":
        return _ask_sqlite(source, sql, timeout_s, limit)
    return _ask_postgresql(source, sql, timeout_s, limit)


def _result(
    cursor: Any, limit: int | None, deadline: float, held: ExitStack, complaint: Callable[[Exception], RecordError]
) -> Result:
    """The cursor's rows; whatever ends them lets go of the database."""

    def rows() -> Iterator[Row]:
        left = limit
        try:
            while left is None or left > 0:
                some = cursor.fetchmany(_FETCH if left is None else min(left, _FETCH))
                if not some:
                    break
                yield from some
                left = None if left is None else left - len(some)
                if time.monotonic() > deadline:  # PostgreSQL's statement timeout counts each fetch for itself
                    raise TimeoutError
        except Exception as error:
            raise complaint(error) from None
        finally:
            held.close()

    return Result([column[0] for column in cursor.description], rows(), held.close)


# SQLite


def _ask_sqlite(database: Database, sql: str, timeout_s: float, limit: int | None) -> Result:
    deadline = time.monotonic() + timeout_s
    complaint = partial(_complaint_sqlite, database, timeout_s)
    file = quote(str(make_url(database.url).database))
    with ExitStack() as stack:
        try:
            connection = sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=BUSY_SECONDS)
            stack.enter_context(closing(connection))
            connection.set_authorizer(_authorizer(connection))
            connection.set_progress_handler(lambda: time.monotonic() > deadline, _STEPS)
            cursor = connection.execute(sql)
        except (sqlite3.Error, sqlite3.Warning) as error:
            raise complaint(error) from None
        stack.enter_context(closing(cursor))
        if cursor.description is None:
            raise _wrong("it gives no columns")
        return _result(cursor, limit, deadline, stack.pop_all(), complaint)


def _authorizer(connection: sqlite3.Connection) -> Callable[..., int]:
    """Allows reading the views, and the columns that they read, where SQLite says that a view (or a WITH) reads them.

    A WITH may carry a view's name, hence the list of columns: through such a name one sees only what the view shows.
    A table, or a WITH, of which no column is named comes with an empty one.
    """
    shown = _columns_shown(connection)
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    hidden = tables - {table for table, _ in shown}

    def allow(action: int, table: str | None, column: str | None, _: str | None, through: str | None) -> int:
        if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE):
            return sqlite3.SQLITE_OK
        if action != sqlite3.SQLITE_READ:
            return sqlite3.SQLITE_DENY
        if column == "":
            seen = table not in hidden
        else:
            seen = table in (*VIEWS, "json_each", "json_tree") or (through in VIEWS and (table, column) in shown)
        return sqlite3.SQLITE_OK if seen else sqlite3.SQLITE_DENY

    return allow


def _columns_shown(connection: sqlite3.Connection) -> set[tuple[str | None, str | None]]:
    """The (table, column) pairs that the documented views read."""
    shown = set()

    def note(action: int, table: str | None, column: str | None, _: str | None, through: str | None) -> int:
        if action == sqlite3.SQLITE_READ and through in VIEWS:
            shown.add((table, column))
        return sqlite3.SQLITE_OK

    connection.set_authorizer(note)
    for view in VIEWS:
        connection.execute(f"SELECT * FROM {view} LIMIT 0")
    connection.set_authorizer(None)
    return shown


def _complaint_sqlite(database: Database, timeout_s: float, error: Exception) -> RecordError:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if isinstance(error, TimeoutError) or code == sqlite3.SQLITE_INTERRUPT:
        return _too_slow(timeout_s)
    if code in (sqlite3.SQLITE_AUTH, sqlite3.SQLITE_READONLY) or "prohibited" in str(error):
        return _refused()
    if "one statement" in str(error):
        return _several()
    if code in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_TOOBIG):
        return _wrong(str(error))
    return explained(error, database.shown)


# PostgreSQL


def _ask_postgresql(database: Database, sql: str, timeout_s: float, limit: int | None) -> Result:
    import psycopg  # an extra: SQLite needs no driver

    if not _QUESTION.match(sql) or _AROUND_THE_ROLE.search(sql):
        raise _refused()
    deadline = time.monotonic() + timeout_s
    complaint = partial(_complaint_postgresql, database, timeout_s)
    url = make_url(database.url).set(drivername="postgresql").render_as_string(hide_password=False)
    with ExitStack() as stack:
        try:
            connection = psycopg.connect(url, connect_timeout=10, application_name="shortstop query")
            stack.enter_context(closing(connection))
            _restrict(connection, timeout_s)
            connection.adapters.register_loader("numeric", _number_loader())
            cursor = stack.enter_context(closing(connection.cursor(name="answer")))
            cursor.execute(sql.encode())
        except psycopg.Error as error:
            raise complaint(error) from None
        if not cursor.description:
            raise _wrong("it gives no columns")
        return _result(cursor, limit, deadline, stack.pop_all(), complaint)


def _number_loader() -> "type[Loader]":
    """Sums and means of integers come as `numeric`: integers and floats here, as SQLite gives them."""
    from psycopg import adapt

    class NumberLoader(adapt.Loader):
        def load(self, data: "Buffer") -> int | float:
            text = bytes(data)
            return int(text) if text.lstrip(b"-").isdigit() else float(text)

    return NumberLoader


def _restrict(connection: "psycopg.Connection[Row]", timeout_s: float) -> None:
    connection.execute("SET TRANSACTION READ ONLY")
    connection.execute("SELECT set_config('statement_timeout', %s, true)", [f"{max(1, round(timeout_s * 1000))}ms"])
    member = "SELECT 1 FROM pg_roles WHERE rolname = %s AND pg_has_role(oid, 'MEMBER')"
    if connection.execute(f"{member} AND has_table_privilege(oid, 'token', 'SELECT')", [READER]).fetchone():
        connection.execute(f"SET LOCAL ROLE {READER}")


def _complaint_postgresql(database: Database, timeout_s: float, error: Exception) -> RecordError:
    state = getattr(error, "sqlstate", None) or ""
    if isinstance(error, TimeoutError) or state == "57014":  # query_canceled
        return _too_slow(timeout_s)
    # insufficient_privilege, read_only_sql_transaction
    if state in ("42501", "25006") or "data-modifying" in str(error):
        return _refused()
    if "multiple commands" in str(error):
        return _several()
    if state.startswith(("42", "22", "0A")):  # syntax or access rule, data, not supported
        return _wrong(str(error))
    return explained(error, database.shown)


def _too_slow(timeout_s: float) -> BadInput:
    return BadInput(f"the query took longer than {timeout_s:g} s; narrow it, or give it more time.")


def _refused() -> BadInput:
    return BadInput(f"the query may only read the views {', '.join(VIEWS)} (docs/sql.md); ask one SELECT over these.")


def _several() -> BadInput:
    return BadInput("the SQL holds more than one statement; ask one SELECT at a time.")


def _wrong(complaint: str) -> BadInput:
    return BadInput(f"the SQL is wrong: {complaint.strip().rstrip('.').splitlines()[0]}; correct it.")
