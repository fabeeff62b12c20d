"""How long the two sides took: batch by batch, a device class at a time, beside what noise alone does.

A machine's pace changes from one hour to the next, so that a job's times are taken as multiples of what its own full
depth took for the same batches, in turns with it. Full depth itself has no such measure: of it the times are compared.
"""

from typing import Any

from cluster.comparing.model import Difference, Floor
from cluster.comparing.noise import floors, speed_columns
from cluster.comparing.wanted import Wanted, as_estimate
from cluster.gates import SPEEDS
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
    names = [name for name in SPEEDS if wanted.has(name)]
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
    in_turns = a.job_id == b.job_id and batches.full is None
    known = None if in_turns else floors(db, content_hash, a, b)
    found = []
    for device_class in sorted(set(batches.device_class.tolist())):
        for name in names:
            speed = speed_of(name, device_class, batches, wanted)
            floor = _IN_TURNS if known is None else known.of(name, device_class, speed.paced)
            found.append(speed.model_copy(update={"floor": floor}))
    return found


def speed_of(name: str, device_class: str, batches: PairedBatches, wanted: Wanted) -> Difference:
    """One of the speeds on one device class, without its floor."""
    mine = batches.device_class == device_class
    columns, clusters = speed_columns(name, batches, mine), Clusters(batches.source_group[mine])
    sums, half = clusters.sums(*columns), len(columns) // 2
    gain = wanted.interval(speed_gain, sums)
    odds = chance(log_speed, sums[:half], sums[half:])
    time_a, units_a, time_b, units_b = (float(sums[place].sum()) for place in (0, 1, half, half + 1))
    return Difference(
        metric=name,
        kind="speed",
        device_class=device_class,
        paced=half > 2,
        a=time_a / units_a / 1e6 if units_a else None,
        b=time_b / units_b / 1e6 if units_b else None,
        relative=as_estimate(gain),
        p_value=odds.two_sided,
        p_worse=odds.worse,
        detectable_relative=detectable(gain.error),
        units=int(mine.sum()),
        groups=clusters.groups,
    )
