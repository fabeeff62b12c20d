"""Jobs and benchmarks of which a part is there: being pruned, or being imported. No work begins on them."""

from typing import Any

from sqlalchemy import ColumnElement, func

from db.tables import job

#: the error of a job, and the beginning of a benchmark's content hash, once they are being removed
PRUNED = "being pruned"
#: the beginning of the error of a job that is being imported, which is a cancelled one until it is whole
IMPORTED = "being imported"


def is_partial(row: Any) -> bool:
    """Whether a row of `job` or `benchmark` is one of which a part may be lacking."""
    mark = row.error if hasattr(row, "error") else row.content_hash
    return mark is not None and mark.startswith((PRUNED, IMPORTED))


def remedy(row: Any) -> str:
    """What is wrong with such a row, and what helps: the rest of a sentence."""
    if hasattr(row, "error") and row.error.startswith(IMPORTED):
        return "is half imported; run its `shortstop import` again, or remove it with `shortstop db prune`."
    return "is half removed; run `shortstop db prune` again."


def whole() -> ColumnElement[bool]:
    """Of a job: all of it is there."""
    error = func.coalesce(job.c.error, "")
    return ~error.startswith(PRUNED) & ~error.startswith(IMPORTED)
