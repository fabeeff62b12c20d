"""Scoring a finished job again: its stored completions, under the metrics as they are now."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from db import jobs, rescoring
from db.rescoring import Completed
from db.session import Database
from workers.estimates import summarise
from workers.scoring.metrics import TokenMetric, metrics, score_text, score_tokens, wanted_metrics


@dataclass(frozen=True)
class Rescored:
    """What scoring again came to."""

    job: int
    revision: int  #: of the scores that are in force now
    completions: int
    metrics: dict[str, str]  #: that were added or renewed: name -> version


def rescore(
    db: Database,
    job_id: int,
    names: Sequence[str] | None = None,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Rescored:
    """Add or renew metrics for every completion of a job that has ended, from its stored text and tokens.

    names: all that the job has where they are absent, `all` is every known one; other scores of the job stay as they
    are. The scores of before are in force until all new ones are written; an interrupted call changes nothing and can
    be made again. on_progress is told samples under a policy, done and in all. Raises `UnknownName`, and `BadInput`
    where the job has not ended.
    """
    pinned = jobs.job(db, job_id).pinned or {}
    wanted = {name: metrics[name].version for name in wanted_metrics(names or pinned.get("metrics"))}

    def score_one(completed: Completed) -> dict[str, float]:
        values = score_text(wanted, completed.text, completed.reference)
        if completed.token_ids is not None and completed.full_token_ids is not None:
            values |= score_tokens(wanted, completed.token_ids, completed.full_token_ids)
        return values

    with_tokens = any(isinstance(metrics[name], TokenMetric) for name in wanted)
    done = rescoring.rescore(db, job_id, wanted, score_one, summarise, with_tokens=with_tokens, on_progress=on_progress)
    return Rescored(job_id, done.revision, done.completions, wanted)
