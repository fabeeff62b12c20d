"""A copy of the record in one file: of SQLite, while workers write to it; PostgreSQL has a tool of its own."""

import os
import shlex
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import make_url

from db.errors import BadInput
from db.session import BUSY_SECONDS, Database, explained


def backup(db: Database, file: Path) -> None:
    """Copy the record to a file that is not there yet; it is there whole or not at all.

    Raises `BadInput` where there is something, where it cannot be written, and for PostgreSQL, with the command that
    does it.
    """
    if db.dialect != "sqlite":
        raise BadInput(f"database {db.shown} is on PostgreSQL; back it up with `{_pg_dump(db, file)}`.")
    _refuse_present(file)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        _copy(db, partial)
        _refuse_present(file)
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)


def _copy(db: Database, file: Path) -> None:
    source = quote(str(make_url(db.url).database))
    try:
        with (
            closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True, timeout=BUSY_SECONDS)) as record,
            closing(sqlite3.connect(file)) as copy,
        ):
            record.backup(copy)  # in one step: between two the copy would start over whenever somebody had committed
    except sqlite3.Error as error:
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_CANTOPEN:
            raise BadInput(f"folder {str(file.parent)!r}: a backup cannot be written there; name another.") from None
        raise explained(error, db.shown) from error


def _refuse_present(file: Path) -> None:
    if file.exists():
        raise BadInput(f"file {str(file)!r} is there already; remove it, or give the backup another name.")


def _pg_dump(db: Database, file: Path) -> str:
    """Without the password: pg_dump takes it from PGPASSWORD or ~/.pgpass."""
    url = make_url(db.url).set(drivername="postgresql", password=None)
    return shlex.join(["pg_dump", "--format=custom", f"--file={file}", url.render_as_string(hide_password=False)])
