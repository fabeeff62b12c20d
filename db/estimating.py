"""How long a job would take, from what the same model took on the same device class before."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select

from db.session import Database
from db.tables import job, run, timing

#: of the model, newest first, that are looked at
_JOBS = 20


@dataclass(frozen=True)
class Estimate:
    """A guess that rests on earlier jobs."""

    seconds: float  #: of work, all workers together, without what loading the model takes
    jobs: int  #: that it was taken from


def estimate(
    db: Database,
    *,
    weights_hash: str,
    device_class: str,
    samples: int,
    max_new_tokens: int,
    policies: Sequence[str],
) -> Estimate | None:
    """Of so many samples under policies of these kinds. None where this model was never timed on this device class.

    A sample is taken to cost what samples did: prefill once, then each policy's decoding, in proportion to
    `max_new_tokens`. A kind that was never timed is taken for the slowest that was.
    """
    of_model = job.c.pinned["weights_hash"].as_string() == weights_hash
    longest = job.c.pinned["max_new_tokens"].as_integer().label("longest")
    recent = select(job.c.id, longest).where(of_model).order_by(job.c.id.desc()).limit(_JOBS).subquery()
    sums = [func.sum(column).label(column.name) for column in (timing.c.rows, timing.c.prefill_ns, timing.c.decode_ns)]
    chosen = (
        select(recent.c.id, recent.c.longest, run.c.policy_kind, *sums)
        .join(run, run.c.job_id == recent.c.id)
        .join(timing, timing.c.run_id == run.c.id)
        .where(timing.c.timed, timing.c.device_class == device_class)
        .group_by(recent.c.id, recent.c.longest, run.c.policy_kind)
    )
    prefill = [0.0, 0.0]  # nanoseconds, rows
    decode: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    with db.read() as connection:
        found = connection.execute(chosen).all()
    for row in found:
        _add(prefill, row.prefill_ns, row.rows)
        _add(decode[row.policy_kind], row.decode_ns * max_new_tokens / row.longest, row.rows)
    if not found:
        return None
    each = {kind: spent / rows for kind, (spent, rows) in decode.items()}
    slowest = max(each.values())
    ns = prefill[0] / prefill[1] + sum(each.get(kind, slowest) for kind in policies)
    return Estimate(samples * ns / 1e9, len({row.id for row in found}))


def _add(sums: list[float], ns: float, rows: int) -> None:
    sums[0] += float(ns)
    sums[1] += rows
