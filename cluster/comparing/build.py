"""Comparing two sides: every pair of runs that belong together, sample by sample and batch by batch."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.comparing.levels import levels as levels_of
from cluster.comparing.model import (
    Agreement,
    Changed,
    Comparison,
    Flip,
    Flips,
    Moved,
    PairComparison,
)
from cluster.comparing.noise import spec_of
from cluster.comparing.quality import quality_of
from cluster.comparing.sides import Asked, against_full, matched, resolve
from cluster.comparing.speeds import speeds
from cluster.comparing.wanted import Wanted
from db.errors import BadInput
from db.jobs import benchmark as benchmark_of
from db.pairs import PairedOutcome, paired_outcomes, positions_seen, scores_of
from db.records import JobRow, RunRow
from db.session import Database
from engine.registry import unknown
from workers.differences import Clusters, holm
from workers.scoring.tokens import first_divergence, token_agreement

#: metrics that hold a completion against full depth of its own job: of two jobs they say nothing
_AGAINST_FULL = ("token_agreement", "exact_agreement", "first_divergence")
#: of each list of samples that changed
LISTED = 50
#: provenance that a comparison tells of where the sides differ
_TOLD = (
    "model", "weights_hash", "tokenizer_hash", "exits", "exits_hash", "dtype", "threads", "device_class",
    "batch_size", "max_new_tokens", "seed", "compile", "git_revision",
)  # fmt: skip


@dataclass(frozen=True)
class Samples:
    """The samples that both runs completed; one place each, in the benchmark's order."""

    sample_id: npt.NDArray[np.int64]
    name: npt.NDArray[np.object_]
    source_group: npt.NDArray[np.object_]
    position: npt.NDArray[np.int64]
    agreement: npt.NDArray[np.float64]  #: share of B's tokens that stand at their place in A's
    divergence: npt.NDArray[np.int64]  #: index of the first token that differs; -1 where none does


@dataclass(frozen=True)
class Ended:
    """The samples that ended under both runs, and which of them with an error."""

    source_group: npt.NDArray[np.object_]
    failed_a: npt.NDArray[np.bool_]
    failed_b: npt.NDArray[np.bool_]
    unpaired: int  #: samples that ended under one of them only


def compare(
    db: Database,
    a: Asked,
    b: Asked | None = None,
    *,
    confidence: float = 0.95,
    metrics: Sequence[str] | None = None,
    levels: Collection[str] = (),
    without: int | None = None,
) -> Comparison:
    """Hold B against A; a job alone: each of its policies against its `full`.

    confidence: of the intervals, two-sided. metrics: only these; all that both sides have when absent. levels: those
    of which B's own figure is wanted as well. without: leave out the samples that this job had, and with them speed.
    Raises `BadInput` (of engine or db) where the two cannot be compared, and `Missing`.
    """
    side_a = resolve(db, a)
    side_b = side_a if b is None else resolve(db, b)
    together = against_full(side_a) if b is None else matched(side_a, side_b)
    wanted = Wanted(confidence, metrics, levels, without)
    pairs = [_pair(db, one, other, side_a.job, side_b.job, wanted) for one, other in together.pairs]
    if metrics is not None:
        _check_known(metrics, pairs)
    return Comparison(
        a=side_a.side,
        b=side_b.side,
        confidence=confidence,
        pairs=_with_holm(pairs),
        changed=changed(side_a.job, side_b.job),
        notes=together.notes,
    )


def changed(a: JobRow, b: JobRow) -> list[Changed]:
    """In which parts of their provenance two jobs differ: model, exits, settings, versions."""
    before, after = a.pinned or {}, b.pinned or {}
    found = [Changed(what=n, a=before.get(n), b=after.get(n)) for n in _TOLD if before.get(n) != after.get(n)]
    for kind, title in (("versions", "package"), ("metrics", "metric")):
        old, new = before.get(kind, {}), after.get(kind, {})
        names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        found += [Changed(what=f"{title} {name}", a=old.get(name), b=new.get(name)) for name in names]
    return found


def _check_known(metrics: Sequence[str], pairs: Sequence[PairComparison]) -> None:
    known = sorted({one.metric for pair in pairs for one in pair.differences})
    for metric in metrics:
        if metric not in known and not metric.startswith("speedup_"):
            raise BadInput(f"{unknown('metric', metric, known)} `shortstop rescore` adds a metric to a job.")


def _pair(db: Database, a: RunRow, b: RunRow, job_a: JobRow, job_b: JobRow, wanted: Wanted) -> PairComparison:
    content = benchmark_of(db, a.benchmark_id)
    pinned_a, pinned_b = job_a.pinned or {}, job_b.pinned or {}
    notes: list[str] = []
    seen = set() if wanted.without is None else positions_seen(db, a.benchmark_id, wanted.without)
    ended, samples = _read_outcomes(row for row in paired_outcomes(db, a, b) if row.position not in seen)
    scores_a, scores_b = (
        {name: column[samples.position] for name, column in scores_of(db, one).items()} for one in (a, b)
    )
    clusters = Clusters(samples.source_group)
    found = []
    shared = _shared_metrics(job_a, job_b, scores_a, scores_b, notes)
    for metric in shared:
        if wanted.has(metric):
            version = pinned_b.get("metrics", {}).get(metric)
            found.append(quality_of(metric, version, clusters, scores_a[metric], scores_b[metric], wanted))
    if wanted.has("errors"):
        found.append(quality_of("errors", None, Clusters(ended.source_group), ended.failed_a, ended.failed_b, wanted))
    found += speeds(db, a, b, pinned_a, pinned_b, content.content_hash, wanted, notes)
    same_spec = spec_of(a, pinned_a) == spec_of(b, pinned_b)
    agreement = _agreement(samples)
    if same_spec and agreement.diverging:
        notes.append(
            f"The same spec wrote other tokens for {agreement.diverging:,} samples; on one device class that must not "
            "be: was it another one?"
        )
    if a.policy == b.policy and a.policy_spec != b.policy_spec:
        notes.append(f"The policy of that name is another one: {a.policy_spec} in A, {b.policy_spec} in B.")
    moved_metric = next(
        (name for name in ("rouge_l", "es", *shared) if name in shared and _differ(scores_a, scores_b, name)), None
    )
    binary = [one.metric for one in found if one.mcnemar is not None and one.metric != "errors"]
    return PairComparison(
        benchmark=b.benchmark,
        content_hash=content.content_hash,
        benchmark_id=a.benchmark_id,
        job_a=a.job_id,
        job_b=b.job_id,
        run_a=a.id,
        run_b=b.id,
        policy_a=a.policy,
        policy_b=b.policy,
        same_spec=same_spec,
        samples=len(ended.failed_a),
        unpaired=ended.unpaired,
        errors_a=int(ended.failed_a.sum()),
        errors_b=int(ended.failed_b.sum()),
        agreement=agreement,
        differences=found,
        levels=levels_of(db, b, pinned_b, clusters, scores_b, wanted),
        flips=[_flips(metric, samples, scores_a[metric], scores_b[metric]) for metric in binary],
        diverged=_diverged(samples),
        moved=[] if moved_metric is None else _moved(samples, scores_a[moved_metric], scores_b[moved_metric]),
        moved_metric=moved_metric,
        notes=notes,
    )


# --- reading ----------------------------------------------------------------------------------------------------------


def _read_outcomes(rows: Any) -> tuple[Ended, Samples]:
    both: list[tuple[str, bool, bool]] = []
    kept: list[tuple[int, str, str, int, float, int]] = []
    unpaired = 0
    for row in rows:
        if row.failed_a is None or row.failed_b is None:
            unpaired += 1
            continue
        both.append((row.source_group, row.failed_a, row.failed_b))
        if not (row.failed_a or row.failed_b):
            kept.append((row.sample_id, row.name, row.source_group, row.position, *_tokens(row)))
    groups, failed_a, failed_b = _columns(both, (object, bool, bool))
    return Ended(groups, failed_a, failed_b, unpaired), Samples(
        *_columns(kept, (np.int64, object, object, np.int64, np.float64, np.int64))
    )


def _tokens(row: PairedOutcome) -> tuple[float, int]:
    """How far B's tokens are A's, and where they part."""
    if row.is_same:
        return 1.0, -1
    a, b = row.ids_a or [], row.ids_b or []
    return token_agreement(b, a), int(first_divergence(b, a))


def _columns(rows: list[Any], kinds: Sequence[Any]) -> list[npt.NDArray[Any]]:
    return [np.array([row[place] for row in rows], kind) for place, kind in enumerate(kinds)]


def _shared_metrics(
    a: JobRow, b: JobRow, scores_a: dict[str, Any], scores_b: dict[str, Any], notes: list[str]
) -> list[str]:
    """Metrics of one version that both have, and a note of each that is left out."""
    old, new = (a.pinned or {}).get("metrics", {}), (b.pinned or {}).get("metrics", {})
    shared = []
    for metric in sorted(scores_a.keys() & scores_b.keys()):
        if metric in _AGAINST_FULL:
            continue
        if old.get(metric) != new.get(metric):
            notes.append(
                f"{metric} is left out: {old.get(metric)} in job {a.id}, {new.get(metric)} in job {b.id}; "
                "`shortstop rescore` renews the scores of a job."
            )
            continue
        shared.append(metric)
    return shared


# --- samples ----------------------------------------------------------------------------------------------------------


def _flips(metric: str, samples: Samples, a: Any, b: Any) -> Flips:
    lost, gained = np.flatnonzero((a == 1) & (b == 0)), np.flatnonzero((a == 0) & (b == 1))
    return Flips(
        metric=metric,
        n_lost=len(lost),
        n_gained=len(gained),
        lost=[Flip(**_named(samples, at)) for at in lost[:LISTED]],
        gained=[Flip(**_named(samples, at)) for at in gained[:LISTED]],
    )


def _differ(a: dict[str, Any], b: dict[str, Any], metric: str) -> bool:
    return bool((np.nan_to_num(a[metric] - b[metric]) != 0).any())


def _moved(samples: Samples, a: Any, b: Any) -> list[Moved]:
    """The samples that lost most, then those that gained most, each most first."""
    change = np.nan_to_num(b - a)
    order = np.argsort(change, kind="stable")
    lost = [at for at in order[: LISTED // 2] if change[at] < 0]
    gained = [at for at in order[::-1][: LISTED // 2] if change[at] > 0]
    return [Moved(**_named(samples, at), a=float(a[at]), b=float(b[at])) for at in [*lost, *gained]]


def _diverged(samples: Samples) -> list[Flip]:
    order = np.argsort(samples.divergence, kind="stable")
    first = int((samples.divergence < 0).sum())  # those that do not part stand before
    return [Flip(**_named(samples, at)) for at in order[first : first + LISTED]]


def _named(samples: Samples, at: int) -> dict[str, Any]:
    return {
        "sample_id": int(samples.sample_id[at]),
        "sample": samples.name[at],
        "source_group": samples.source_group[at],
    }


def _agreement(samples: Samples) -> Agreement:
    n = len(samples.position)
    places = samples.divergence[samples.divergence >= 0]
    return Agreement(
        exact=float((samples.divergence < 0).mean()) if n else None,
        tokens=float(samples.agreement.mean()) if n else None,
        diverging=len(places),
        median_divergence=float(np.median(places)) if len(places) else None,
        first_divergence={str(place): count for place, count in sorted(Counter(places.tolist()).items())},
    )


def _with_holm(pairs: list[PairComparison]) -> list[PairComparison]:
    """Every difference with its p-value corrected for all of them."""
    corrected = iter(holm([one.p_value or 0.0 for pair in pairs for one in pair.differences]))
    return [
        pair.model_copy(
            update={"differences": [one.model_copy(update={"p_holm": next(corrected)}) for one in pair.differences]}
        )
        for pair in pairs
    ]
