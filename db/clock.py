"""The database's clock: leases never compare the clocks of two machines."""

from typing import Any

from sqlalchemy import Double
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement


class now(FunctionElement[float]):
    """Seconds since 1970, read when the statement runs (on PostgreSQL not when the transaction began)."""

    type = Double()
    inherit_cache = True


@compiles(now, "sqlite")
def _on_sqlite(element: now, compiler: Any, **_: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"  # unixepoch('subsec') is missing before SQLite 3.42


@compiles(now, "postgresql")
def _on_postgresql(element: now, compiler: Any, **_: Any) -> str:
    return "(extract(epoch from clock_timestamp())::double precision)"
