"""The noise floor: how far two runs of the same spec differ in speed. In quality they do not differ at all."""

import json
from typing import Any

import numpy as np

from cluster.comparing.model import Floor
from cluster.gates import SPEEDS
from db.noise import NoisePair, keep_pairs, pairs_of, unpaired_runs
from db.pairs import PairedBatches, paired_batches
from db.records import RunRow
from db.session import Database
from workers.differences import log_speed, noise_floor

#: what two runs must share to be runs of the same spec; beside it their benchmark and their policy
SAME = (
    "weights_hash",
    "tokenizer_hash",
    "exits_hash",
    "dtype",
    "threads",
    "compile",
    "seed",
    "max_new_tokens",
    "batch_size",
    "versions",
    "git_revision",
)
#: runs of one benchmark and policy that are looked at for pairs at once
_NEWEST = 400


def spec_of(run: RunRow, pinned: dict[str, Any]) -> str:
    """What is the same of two runs of the same spec, and of no others."""
    return json.dumps(
        [run.benchmark_id, run.policy_kind, run.policy_spec, [pinned.get(name) for name in SAME]], sort_keys=True
    )


class Floors:
    """Floors by device class, of one benchmark and policy, without what one pair of runs says of itself."""

    def __init__(self, pairs: list[NoisePair], a: RunRow, b: RunRow) -> None:
        self._pairs = [pair for pair in pairs if {pair.run_a, pair.run_b} != {a.id, b.id}]

    def of(self, metric: str, device_class: str, paced: bool) -> Floor:
        """paced: of speeds that are held against full depth of each job."""
        name = ("paced" if paced else "log") + metric.removeprefix("speedup")
        ratios = [getattr(pair, name) for pair in self._pairs if pair.device_class == device_class]
        known = [ratio for ratio in ratios if ratio is not None]
        return Floor(pairs=len(known), share=noise_floor(known))


def floors(db: Database, content_hash: str, a: RunRow, b: RunRow) -> Floors:
    """What is known on this benchmark for B's policy, or for A's where B is full depth, of which only the clock's are.

    Runs that nobody has paired yet are paired first.
    """
    policy = b.policy if b.policy_kind != "full" else a.policy
    pair_runs(db, content_hash, policy)
    return Floors(pairs_of(db, content_hash, policy), a, b)


def pair_runs(db: Database, content_hash: str, policy: str) -> int:
    """Pair runs of the same spec, each with the next, each in one pair. Returns how many pairs are new."""
    waiting: dict[str, tuple[RunRow, dict[str, Any]]] = {}
    found = []
    for run, pinned in unpaired_runs(db, content_hash, policy, newest=_NEWEST):
        key = spec_of(run, pinned)
        if key not in waiting:
            waiting[key] = (run, pinned)
            continue
        first, _ = waiting.pop(key)
        batches = paired_batches(db, first, run, pinned["batch_size"])
        found += [_pair(first, run, content_hash, name, batches) for name in _classes(batches)]
    if found:
        keep_pairs(db, found)
    return len(found)


def _classes(batches: PairedBatches) -> list[str]:
    """Those with enough of both runs to have a speed."""
    names = sorted(set(batches.device_class.tolist()))
    return [name for name in names if all(_total(batches.by_the_clock, name, metric).all() for metric in SPEEDS)]


def _pair(a: RunRow, b: RunRow, content_hash: str, device_class: str, batches: PairedBatches) -> NoisePair:
    clock = [_total(batches.by_the_clock, device_class, metric) for metric in SPEEDS]
    paced = [_total(batches, device_class, metric) for metric in SPEEDS]
    logs = [float(log_speed(*sums, axis=-1)) for sums in clock]
    multiples = [float(log_speed(*sums, axis=-1)) if len(sums) > 4 and sums.all() else None for sums in paced]
    return NoisePair(a.id, b.id, device_class, content_hash, b.policy, *logs, *multiples)


def _total(batches: PairedBatches, device_class: str, metric: str) -> Any:
    """The columns of a speed, summed: [columns, 1]."""
    columns = speed_columns(metric, batches, batches.device_class == device_class)
    return np.array([[column.sum(dtype=np.float64)] for column in columns])


def speed_columns(metric: str, batches: PairedBatches, of: Any) -> list[Any]:
    """What `speed_gain` takes, of some batches."""
    return batches.per_token(of) if metric == "speedup_token" else batches.per_request(of)
