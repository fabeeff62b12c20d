"""One at a time on a database, in whatever process and on whatever machine: who supervises a fleet over all jobs.

PostgreSQL keeps an advisory lock for as long as the connection lives, SQLite's machine a lock on a file beside the
record for as long as the process does: whoever dies has let go, and nothing is left to be cleared away.
"""

from pathlib import Path

from filelock import FileLock, Timeout
from sqlalchemy import Connection, make_url, text
from sqlalchemy.exc import SQLAlchemyError

from db.session import Database

#: of the advisory lock; migrations have another one
_KEY = 5740738


class Exclusive:
    """What only one may hold. Belongs to one thread."""

    def __init__(self, db: Database, who: str) -> None:
        """who: shown to those who find it taken."""
        self.db = db
        self.who = who
        self._connection: Connection | None = None
        self._file = Path(f"{make_url(db.url).database}-fleet") if db.dialect == "sqlite" else None
        self._lock = FileLock(f"{self._file}.lock", timeout=0) if self._file else None

    def take(self) -> bool:
        """Whether it is held from now on. Raises `Unavailable`."""
        if self._lock is None or self._file is None:
            return self._take_on_postgresql()
        try:
            self._lock.acquire()
        except Timeout:
            return False
        self._file.write_text(self.who, encoding="utf-8")
        return True

    def kept(self) -> bool:
        """Whether it is still held: a connection that was lost has let go, and is made again. Raises `Unavailable`."""
        if self._lock is not None:
            return self._lock.is_locked
        if self._connection is None:
            return self.take()
        try:
            self._connection.execute(text("SELECT 1"))
        except SQLAlchemyError:
            self.release()
            return self.take()
        return True

    def holder(self) -> str:
        """Who has it, as far as is known."""
        if self._file is not None:
            try:
                return self._file.read_text(encoding="utf-8") or "another process"
            except OSError:  # it lets go just now
                return "another process"
        holding = text(
            "SELECT a.application_name FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE l.locktype = "
            "'advisory' AND l.objid = :key AND l.granted AND l.database = (SELECT oid FROM pg_database WHERE datname = "
            "current_database())"
        )
        with self.db.read() as connection:
            name = connection.execute(holding, {"key": _KEY}).scalars().first()
        return name.removeprefix("shortstop fleet ") if name else "another process"

    def release(self) -> None:
        """Let go, where it is held."""
        if self._connection is not None:
            self._connection.invalidate()
            self._connection.close()
            self._connection = None
        if self._lock is not None and self._file is not None and self._lock.is_locked:
            self._file.unlink(missing_ok=True)
            self._lock.release()

    def _take_on_postgresql(self) -> bool:
        connection = self.db.lasting_connection()
        connection.execute(
            text("SELECT set_config('application_name', :name, false)"), {"name": f"shortstop fleet {self.who}"[:63]}
        )
        if connection.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": _KEY}).scalar_one():
            self._connection = connection
            return True
        connection.invalidate()
        connection.close()
        return False
