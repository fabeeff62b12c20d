"""Kernel choices per device class: measured once, the same for every worker."""

from collections.abc import Callable
from typing import Any

from sqlalchemy import select

from db.clock import now
from db.session import Database
from db.tables import device_class, insert_new


def device_plan(db: Database, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The choices for the device class `name`. `measure` is called where there are none yet; the first writer wins."""
    known = _plan(db, name)
    if known is not None:
        return known
    measured = measure()  # takes seconds: outside any transaction
    with db.write() as connection:
        insert_new(connection, device_class, {"name": name, "plan": measured, "created_at": now()})
    plan = _plan(db, name)
    assert plan is not None
    return plan


def _plan(db: Database, name: str) -> dict[str, Any] | None:
    with db.read() as connection:
        plan = connection.execute(select(device_class.c.plan).where(device_class.c.name == name)).scalar_one_or_none()
    return None if plan is None else dict(plan)
