"""Whether a job would find what another has found: the same weights, exits, samples, policies, versions, device."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cluster.places import anchored
from cluster.prepare import resolve
from cluster.spec import JobSpec
from db import jobs
from db.records import JobState
from db.session import Database

#: names of what the hashes beside them tell for good
_NAMES = ("model", "exits", "benchmarks")


def done_before(db: Database, spec: JobSpec, folder: Path, *, workers: int = 1) -> int | None:
    """The newest finished job that would come out the same; None where there is none.

    workers: how many are to share this machine, as in `cluster.prepare.prepare`. Raises `BadInput`.
    """
    resolved = resolve(anchored(spec, folder), workers=workers)
    pinned = resolved.pinned.model_dump(mode="json")
    policies = _written(policy.spec for policy in resolved.policies)
    for job in jobs.list_jobs(db):
        if job.state is JobState.DONE and job.pinned is not None and _facts(job.pinned) == _facts(pinned):
            found = {run.policy: run.policy_spec for run in jobs.runs(db, job.id)}
            if _written(found.values()) == policies:
                return job.id
    return None


def _facts(pinned: dict[str, Any]) -> str:
    facts = {name: value for name, value in pinned.items() if name not in _NAMES and value is not None}
    return json.dumps([facts, list(pinned.get("benchmarks", {}).values())], sort_keys=True)


def _written(policies: Iterable[dict[str, Any]]) -> list[str]:
    return sorted(json.dumps(policy, sort_keys=True) for policy in policies)
