"""Adding a policy to a finished job: checked against what the job pins, before anything is written."""

from typing import Any

from cluster.prepare import metric_versions, planned_policy
from db import jobs, planning
from db.errors import Conflict
from db.events import LOCAL
from db.jobs import JobState
from db.session import Database
from engine.errors import BadInput
from engine.exits import ExitsManifest, check_policy, read_manifest
from engine.loading import cache_folder
from engine.spec import parse_policy
from workers.bundle import unpack
from workers.pinned import Pinned


def add_policy(db: Database, job_id: int, policy: Any, *, who: str = LOCAL) -> str:
    """Add a policy, in any form that a spec takes, to a job that is done. Returns its label.

    Only its runs are computed, on the samples, in the batches and under the facts that the job pins; the job is running
    until they are (`cluster.jobs.work`). Raises `BadInput` (of engine or db), and changes nothing then.
    """
    asked = parse_policy(policy)
    job = jobs.job(db, job_id)
    if job.state is not JobState.DONE:
        raise Conflict(f"job {job_id} is {job.state}; a policy can be added to a job that is done.")
    if "weights_hash" not in (job.pinned or {}):
        raise Conflict(f"job {job_id} has no model, only completions that were imported; submit a job that names one.")
    pinned = Pinned.model_validate(job.pinned)
    if pinned.trace is not None:
        raise BadInput(f"job {job_id} is a trace, which runs no policy; ask it with `shortstop replay {job_id}`.")
    check_metrics(job_id, pinned.metrics)
    if asked.needs != "nothing" and pinned.exits_hash is None:
        raise BadInput(
            f"policy {asked.kind!r} needs exits, and job {job_id} has none; submit a job that names a bundle in the "
            "field `exits`."
        )
    manifest = _manifest(db, pinned)
    check_policy(asked, manifest, pinned.n_layers)
    planned = planned_policy(asked, manifest)
    planning.add_policy(db, job_id, planned, who=who)
    return planned.label


def check_metrics(job_id: int, pinned: dict[str, str]) -> None:
    """Scores of two versions must not stand side by side. pinned: the job's, by metric. Raises `BadInput`."""
    for name, version in metric_versions(pinned).items():
        if version != pinned[name]:
            raise BadInput(
                f"job {job_id} was scored with {pinned[name]!r}, and here metric {name!r} is {version!r}; "
                f"renew its scores first: `shortstop rescore {job_id}`."
            )


def _manifest(db: Database, pinned: Pinned) -> ExitsManifest | None:
    if pinned.exits_hash is None:
        return None
    return read_manifest(unpack(jobs.artifact(db, pinned.exits_hash), pinned.exits_hash, cache_folder()))
