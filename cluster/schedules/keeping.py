"""Schedules on a database at hand: checked as far as their job before they are written."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.gates import ERRORS, SPEEDS
from cluster.places import anchored
from cluster.schedules.cron import next_moment
from cluster.schedules.latest import resolved, without_latest
from cluster.schedules.service import AddedSchedule, ScheduleDetails, Schedules, ScheduleSummary
from cluster.schedules.spec import ScheduleSpec, parse_schedule
from cluster.schedules.ticking import wish_of
from cluster.schedules.webhooks import Receivers
from cluster.settings import Settings
from db import firings, incidents, jobs, schedules
from db.schedules import FiringRow, ScheduleRow, database_clock
from db.session import Database
from engine.errors import BadInput
from engine.registry import unknown
from workers.estimates import FEWEST_GROUPS

if TYPE_CHECKING:
    from cluster.prepare import Validation


class LocalSchedules(Schedules):
    """The schedules of one database."""

    def __init__(self, opened: Callable[[], Database], settings: Settings, who: str) -> None:
        """opened: the database, which is made where there is none. who: the principal of what is done."""
        self._opened, self._settings, self._who = opened, settings, who

    def add(self, spec: ScheduleSpec, folder: Path | None = None) -> AddedSchedule:
        from cluster.prepare import validate

        here = folder or Path.cwd()
        job = without_latest(spec.job, lambda job: anchored(job, here))
        spec = spec.model_copy(update={"job": job})
        receivers = Receivers(self._settings.webhook_allow)
        for url in spec.webhooks:
            receivers.check(url)
        found = validate(resolved(spec.job)[0], workers=self._settings.workers)
        _check_gate(spec, found)
        db = self._opened()
        if spec.baseline.job is not None:
            _check_baseline(db, spec.baseline.job, found)
        at = database_clock(db)()
        next_at = next_moment(spec.cron, spec.zone, at, spec.end)
        if next_at is None:
            raise BadInput(f"ends {spec.ends!r}: schedule {spec.name!r} would never fire; give a later day.")
        secrets = {url: incidents.new_secret() for url in spec.webhooks}
        row = schedules.add(
            db,
            spec.name,
            spec.dump(),
            overlap=spec.overlap,
            next_at=next_at,
            principal=self._who,
            at=at,
            baseline_job=spec.baseline.job,
            webhooks=list(secrets.items()),
        )
        return AddedSchedule(row, secrets)

    def list(self) -> list[ScheduleSummary]:
        db = self._opened()
        last, opened = firings.last_firings(db), incidents.open_incidents(db)
        return [ScheduleSummary(row, last.get(row.id), opened.get(row.id)) for row in schedules.schedules(db)]

    def show(self, name: str, *, limit: int = 50) -> ScheduleDetails:
        db = self._opened()
        row = schedules.find(db, name)
        found = firings.firings(db, row.id, limit=limit)
        opened = incidents.open_incidents(db).get(row.id)
        return ScheduleDetails(row, opened, found, incidents.messages(db, row.id))

    def pause(self, name: str) -> ScheduleRow:
        return self._set_paused(name, True)

    def resume(self, name: str) -> ScheduleRow:
        return self._set_paused(name, False)

    def _set_paused(self, name: str, paused: bool) -> ScheduleRow:
        db = self._opened()
        row = schedules.find(db, name)
        spec = parse_schedule(row.spec)
        following = row.next_at if paused else next_moment(spec.cron, spec.zone, database_clock(db)(), spec.end)
        schedules.set_paused(db, row.id, paused, following)
        return schedules.find(db, name)

    def remove(self, name: str) -> None:
        db = self._opened()
        schedules.remove(db, schedules.find(db, name).id)

    def trigger(self, name: str) -> FiringRow:
        db = self._opened()
        row = schedules.find(db, name)
        wish = wish_of(row)
        if wish.refusal is not None:
            raise BadInput(wish.refusal)
        return firings.trigger(db, row, wish, database_clock(db)())

    def resend(self, name: str) -> int:
        db = self._opened()
        return incidents.send_again(db, schedules.find(db, name).id, database_clock(db)())


def _check_gate(spec: ScheduleSpec, found: "Validation") -> None:
    """That the job has what the gate asks for, and enough samples for it. Raises `BadInput`."""
    from cluster.prepare import metric_versions

    if spec.gate is None:
        return
    metrics = [*metric_versions(spec.job.metrics), *SPEEDS, ERRORS]
    names = [one.name for one in found.benchmarks]
    for rule in spec.gate.rules:
        for field, value, known in (
            ("metric", rule.metric, metrics),
            ("benchmark", rule.benchmark, names),
            ("policy", rule.policy, found.policies),
        ):
            if value is not None and value not in known:
                raise BadInput(f"gate: rule for {rule.metric!r}: {unknown(field, value, known)}")
    for one in found.benchmarks:
        if one.samples < FEWEST_GROUPS:
            raise BadInput(
                f"gate: benchmark {one.name!r} has {one.samples} samples, too few for any verdict; at least "
                f"{FEWEST_GROUPS}, each of another source group, would do, and a small loss takes some hundred."
            )


def _check_baseline(db: Database, job_id: int, found: "Validation") -> None:
    """That a pinned job ran the schedule's benchmarks. Raises `BadInput`."""
    schedules.check_baseline_job(db, job_id)
    pinned = (jobs.job(db, job_id).pinned or {}).get("benchmarks", {})
    for one in found.benchmarks:
        if pinned.get(one.name, one.content_hash) != one.content_hash:
            raise BadInput(
                f"baseline: benchmark {one.name!r} has other samples in job {job_id} (hash {pinned[one.name][:12]}) "
                f"than in this schedule (hash {one.content_hash[:12]}); name a job on the same samples."
            )
    if not any(one.name in pinned for one in found.benchmarks):
        names = ", ".join(one.name for one in found.benchmarks)
        raise BadInput(f"baseline: job {job_id} has no benchmark of this schedule ({names}); name a job that does.")
