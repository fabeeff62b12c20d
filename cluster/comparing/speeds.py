"""How long the two sides took: batch by batch, a device class at a time, beside what noise alone does."""

from typing import Any

import numpy as np

from cluster.comparing.model import Difference, Floor
from cluster.comparing.noise import floors
from cluster.comparing.wanted import Wanted, as_estimate
from db.pairs import PairedBatches, paired_batches
from db.records import RunRow
from db.session import Database
from workers.differences import Clusters, chance, detectable, log_speed, speed_gain

#: of two policies of one job: they were timed in turns, and what disturbs a machine disturbs both
_IN_TURNS = Floor(pairs=0, share=0.0)


def speeds(
    db: Database,
    a: RunRow,
    b: RunRow,
    pinned_a: dict[str, Any],
    pinned_b: dict[str, Any],
    content_hash: str,
    wanted: Wanted,
    notes: list[str],
) -> list[Difference]:
    """Of both speeds a difference a device class; `notes` gets a sentence where there is none."""
    names = [name for name in ("speedup_token", "speedup_request") if wanted.has(name)]
    if not names or wanted.without is not None:
        return []
    if pinned_a["batch_size"] != pinned_b["batch_size"]:
        notes.append(
            f"Speed is left out: batches of {pinned_a['batch_size']} in job {a.job_id} and of {pinned_b['batch_size']} "
            f"in job {b.job_id} take their time in other ways."
        )
        return []
    batches = paired_batches(db, a, b, pinned_a["batch_size"])
    if not len(batches):
        notes.append("Speed is left out: there is no batch that both timed on the same device class.")
        return []
    known = None if a.job_id == b.job_id else floors(db, content_hash, a, b)
    found = []
    for device_class in sorted(set(batches.device_class.tolist())):
        for name in names:
            speed = speed_of(name, device_class, batches, wanted)
            floor = _IN_TURNS if known is None else known.of(name, device_class)
            found.append(speed.model_copy(update={"floor": floor}))
    return found


def speed_of(name: str, device_class: str, batches: PairedBatches, wanted: Wanted) -> Difference:
    """One of the speeds on one device class, without its floor."""
    mine = batches.device_class == device_class
    columns, clusters = _speed_columns(name, batches, mine), Clusters(batches.source_group[mine])
    sums = clusters.sums(*columns)
    gain = wanted.interval(speed_gain, sums)
    odds = chance(log_speed, sums[:2], sums[2:])
    time_a, units_a, time_b, units_b = (float(column.sum()) for column in sums)
    return Difference(
        metric=name,
        kind="speed",
        device_class=device_class,
        a=time_a / units_a / 1e6 if units_a else None,
        b=time_b / units_b / 1e6 if units_b else None,
        relative=as_estimate(gain),
        p_value=odds.two_sided,
        p_worse=odds.worse,
        detectable_relative=detectable(gain.error),
        units=int(mine.sum()),
        groups=clusters.groups,
    )


def _speed_columns(name: str, batches: PairedBatches, mine: Any) -> list[Any]:
    """Time and units of A, then of B."""
    columns: list[Any]
    if name == "speedup_token":
        columns = [batches.decode_a, batches.tokens_a, batches.decode_b, batches.tokens_b]
    else:
        one = np.ones(len(batches))
        columns = [batches.prefill_a + batches.decode_a, one, batches.prefill_b + batches.decode_b, one]
    return [column[mine] for column in columns]
