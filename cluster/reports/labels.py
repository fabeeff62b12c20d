"""What judges said, as a report shows it: read from the labels as they are now, which may come at any time."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from cluster.reports.model import Estimate, Judges, RunLabels
from db import labels
from db.labels import Judged, Rating
from db.records import RunRow
from db.session import Database
from workers.agreement import acceptance_rate, krippendorff_alpha, predicted


@dataclass(frozen=True)
class Labels:
    """Of one job."""

    runs: dict[int, RunLabels] = field(default_factory=dict)  #: by run, those of which something was judged
    judges: dict[int, Judges] = field(default_factory=dict)  #: by benchmark


def labels_of(db: Database, runs: Sequence[RunRow]) -> Labels:
    """runs: all of one job."""
    ratings = labels.ratings(db, runs[0].job_id) if runs else []
    if not ratings:
        return Labels()
    by_run: defaultdict[int, dict[int, Judged]] = defaultdict(dict)
    for one in labels.judged(db, runs[0].job_id):
        by_run[one.run_id][one.sample_id] = one
    found = {}
    for run in runs:
        full = next((o for o in runs if o.policy_kind == "full" and o.benchmark_id == run.benchmark_id), None)
        if run.id in by_run:
            found[run.id] = _of_run(by_run[run.id], None if full in (None, run) else by_run.get(full.id))
    by_benchmark: defaultdict[int, list[Rating]] = defaultdict(list)
    for rating in ratings:
        by_benchmark[rating.benchmark_id].append(rating)
    return Labels(found, {benchmark_id: _judges(own) for benchmark_id, own in by_benchmark.items()})


def _of_run(own: dict[int, Judged], full: dict[int, Judged] | None) -> RunLabels:
    """By sample. full: those of full depth on the same benchmark, None for itself."""
    completions = list(own.values())
    groups = [one.source_group for one in completions]
    rate = acceptance_rate(groups, [one.accepted for one in completions])
    both = [one for one in completions if full is not None and one.sample_id in full]
    change = [one.accepted - (full or {})[one.sample_id].accepted for one in both]
    fields: dict[str, Estimate] = {}
    scored = [one for one in completions if one.proxy is not None]
    if scored:
        proxy = [one.proxy or 0.0 for one in scored]
        found = asdict(predicted([one.source_group for one in scored], [one.accepted for one in scored], proxy))
        fields = {name: Estimate(**found[name]) for name in ("proxy", "precision", "recall", "agreement")}
    if both:
        fields["acceptance_change"] = Estimate(**acceptance_rate([one.source_group for one in both], change))
    return RunLabels(judged=len(completions), acceptance_rate=Estimate(**rate), **fields)


def _judges(ratings: Sequence[Rating]) -> Judges:
    """Of one benchmark."""
    counts: defaultdict[tuple[int, str], int] = defaultdict(int)
    for rating in ratings:
        counts[rating.item] += 1
    return Judges(
        names=sorted({rating.judge for rating in ratings}),
        texts=len(counts),
        shared=sum(count > 1 for count in counts.values()),
        alpha=krippendorff_alpha([(rating.item, rating.judge, rating.accepted) for rating in ratings]),
    )
