"""What was measured of a device class: once, by whoever came first, the same for every worker."""

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import select

from db.clock import now
from db.session import Database
from db.tables import device_class, insert_new, job_kernels, run, timing
from db.tables import kernel_plan as kernel_plan_table

#: kernels by shape of matrix: see `engine.engine.Engine.kernels`
Kernels = dict[str, list[str]]


def device_plan(db: Database, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the device class `name` reaches. `measure` is called where nobody knows yet; the first writer wins."""
    known = known_plan(db, name)
    if known is not None:
        return known
    measured = measure()  # takes seconds: outside any transaction
    with db.write() as connection:
        insert_new(connection, device_class, {"name": name, "plan": measured, "created_at": now()})
    plan = known_plan(db, name)
    assert plan is not None
    return plan


def kernel_plan(db: Database, name: str, shapes: Sequence[str], measure: Callable[[Sequence[str]], Kernels]) -> Kernels:
    """The kernels of the device class `name` for these shapes; those that nobody has measured yet are measured now.

    Of two that measure a shape at once the first writer wins, and both get its choice.
    """
    known = _kernels(db, name, shapes)
    missing = sorted(set(shapes) - known.keys())  # in one order for all, so that two writers never wait in a circle
    if not missing:
        return known
    measured = measure(missing)  # takes seconds: outside any transaction
    with db.write() as connection:
        for shape in missing:
            row = {"device_class": name, "shape": shape, "kernels": measured[shape], "created_at": now()}
            insert_new(connection, kernel_plan_table, row)
    return _kernels(db, name, shapes)


def keep_kernels(db: Database, job_id: int, name: str, kernels: Kernels) -> None:
    """Note with which kernels workers of the device class `name` compute a job; a second note changes nothing."""
    row = {"job_id": job_id, "device_class": name, "kernels": kernels}
    with db.write() as connection:
        insert_new(connection, job_kernels, row)


def kernels_of(db: Database, job_id: int) -> dict[str, Kernels]:
    """By device class, the kernels with which the results that a job has by now were computed."""
    classes = select(timing.c.device_class).join(run).where(run.c.job_id == job_id)
    noted = select(job_kernels.c.device_class, job_kernels.c.kernels).where(
        job_kernels.c.job_id == job_id, job_kernels.c.device_class.in_(classes)
    )
    with db.read() as connection:
        return dict(connection.execute(noted.order_by(job_kernels.c.device_class)).all())


def known_plan(db: Database, name: str) -> dict[str, Any] | None:
    """What the device class `name` reaches; None where nobody has measured it for this record."""
    with db.read() as connection:
        plan = connection.execute(select(device_class.c.plan).where(device_class.c.name == name)).scalar_one_or_none()
    return None if plan is None else dict(plan)


def _kernels(db: Database, name: str, shapes: Sequence[str]) -> Kernels:
    of_class = select(kernel_plan_table.c.shape, kernel_plan_table.c.kernels).where(
        kernel_plan_table.c.device_class == name, kernel_plan_table.c.shape.in_(shapes)
    )
    with db.read() as connection:
        return dict(connection.execute(of_class.order_by(kernel_plan_table.c.shape)).all())
