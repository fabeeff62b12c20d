"""A benchmark's samples that stand in a corpus, apart from the others."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cluster.reports.model import Apart, Estimate, Overlapping, RunReport
from db import overlaps, results
from db.records import BenchmarkRow
from db.session import Database
from workers.estimates import mean_of

#: of the run's metrics those that are shown apart, as far as it has them
SHOWN = ("em", "es", "rouge_l", "accepted")


def overlap_of(db: Database, benchmark: BenchmarkRow, runs: Sequence[RunReport], *, ended: bool) -> Overlapping | None:
    """What is known of a benchmark's overlap with corpora; None where nobody has looked.

    ended: whether the runs have all their samples; scores apart are shown then.
    """
    corpora, rows = overlaps.of_benchmark(db, benchmark.id)
    if not corpora:
        return None
    flagged = sorted({row.position for row in rows})
    apart = [_apart(db, run, flagged) for run in runs] if ended and flagged else []
    return Overlapping(
        corpora=[one.corpus for one in corpora],
        judged=min(one.judged for one in corpora),
        flagged=len(flagged),
        runs=apart,
    )


def _apart(db: Database, run: RunReport, flagged: Sequence[int]) -> Apart:
    data = results.run_data(db, run.run_id)
    is_flagged = np.isin(data.sample, flagged)

    def means(chosen: Any) -> dict[str, Estimate]:
        return {
            name: Estimate(**mean_of(data.source_group[chosen], data.scores[name][chosen]))
            for name in SHOWN
            if name in data.scores
        }

    return Apart(mark=run.mark, policy=run.policy, flagged=means(is_flagged), others=means(~is_flagged))
