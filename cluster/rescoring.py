"""Scoring a finished job again: its stored completions, under the metrics as they are now."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from db import jobs, rescoring
from db.rescoring import Completed
from db.session import Database
from engine.errors import BadInput
from workers.estimates import summarise
from workers.scoring.metrics import (
    TokenMetric,
    executed_metrics,
    metrics,
    score_execution,
    score_text,
    score_tokens,
    wanted_metrics,
)


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
    execute: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Rescored:
    """Add or renew metrics for every completion of a job that has ended, from its stored text and tokens.

    names: all that the job has where they are absent, `all` is every known one that executes nothing; other scores of
    the job stay as they are. The scores of before are in force until all new ones are written; an interrupted call
    changes nothing and can be made again. execute: allows metrics that execute completions, in a sandbox. on_progress
    is told samples under a policy, done and in all. Raises `UnknownName`, and `BadInput` where the job has not ended,
    or completions may not or cannot be executed.
    """
    pinned = jobs.job(db, job_id).pinned or {}
    _check_texts(job_id, pinned)
    if pinned.get("trace") is not None:
        raise BadInput(f"job {job_id} is a trace, which has no completions to score; score a job that ran policies.")
    names = names or list(pinned.get("metrics", wanted_metrics(None)))
    executed = executed_metrics(wanted_metrics(names))
    if executed:
        _check_execution(executed[0], execute)
    wanted = {name: metrics[name].version for name in wanted_metrics(names)}

    def score_one(completed: Completed) -> dict[str, float]:
        values = score_text(wanted, completed.text, completed.reference)
        if completed.token_ids is not None and completed.full_token_ids is not None:
            values |= score_tokens(wanted, completed.token_ids, completed.full_token_ids)
        if completed.prompt is not None:
            values |= score_execution(wanted, completed.prompt, completed.text, completed.test)
        return values

    with_tokens = any(isinstance(metrics[name], TokenMetric) for name in wanted)
    done = rescoring.rescore(
        db,
        job_id,
        wanted,
        score_one,
        summarise,
        with_tokens=with_tokens,
        with_tests=bool(executed),
        on_progress=on_progress,
    )
    return Rescored(job_id, done.revision, done.completions, wanted)


def _check_texts(job_id: int, pinned: dict[str, Any]) -> None:
    """Raises `BadInput` where the record has hashes for texts: there is nothing to score."""
    of = {content_hash: name for name, content_hash in pinned.get("benchmarks", {}).items()}
    for content_hash in pinned.get("withheld", {}):
        raise BadInput(
            f"job {job_id}: benchmark {of.get(content_hash, content_hash[:12])!r} has store_text: false, so its "
            "completions are hashes, which cannot be scored again; submit a job that names the metrics."
        )


def _check_execution(name: str, allowed: bool) -> None:
    """Raises `BadInput` where completions may not be executed, or there is no sandbox for them."""
    from workers.execution.sandbox import check_sandbox

    if not allowed:
        raise BadInput(
            f"metric {name!r} executes what the model wrote; allow it with --execute, or name the other metrics."
        )
    check_sandbox()
