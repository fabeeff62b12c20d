"""Schedules of a server, asked for over HTTP."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cluster.schedules.latest import is_latest, without_latest
from cluster.schedules.service import AddedSchedule, ScheduleDetails, Schedules, ScheduleSummary
from cluster.schedules.spec import ScheduleSpec, parse_schedule
from cluster.upload import uploaded
from db.schedules import FiringRow, ScheduleRow
from engine.errors import BadInput


class RemoteSchedules(Schedules):
    """What `LocalSchedules` does, done by a server."""

    def __init__(self, typed: Callable[..., Any], ask: Callable[..., Any], upload: Callable[[bytes], str]) -> None:
        """typed: (kind, method, path, **options); ask: (method, path, **options); both as the client has them."""
        self._typed, self._ask, self._upload = typed, ask, upload

    def add(self, spec: ScheduleSpec | dict[str, Any], folder: Path | None = None) -> AddedSchedule:
        """As `Schedules.add`. Local folders and files are uploaded; `latest` is looked up where the server is."""
        asked = parse_schedule(spec)
        for field in ("model", "exits"):
            value = getattr(asked.job, field)
            if is_latest(value) and not Path(value).is_absolute():
                raise BadInput(f"{field} {value!r}: a server looks it up on its own disk; give an absolute path there.")
        here = folder or Path.cwd()
        job = without_latest(asked.job, lambda job: uploaded(job, here, self._upload), stand_in="upload:")
        body = asked.model_copy(update={"job": job}).dump()
        found: AddedSchedule = self._typed(AddedSchedule, "POST", "/v1/schedules", json=body)
        return found

    def list(self) -> list[ScheduleSummary]:
        found: list[ScheduleSummary] = self._typed(list[ScheduleSummary], "GET", "/v1/schedules")
        return found

    def show(self, name: str, *, limit: int = 50) -> ScheduleDetails:
        found: ScheduleDetails = self._typed(ScheduleDetails, "GET", _path(name), params={"limit": limit})
        return found

    def pause(self, name: str) -> ScheduleRow:
        return self._changed(name, "pause")

    def resume(self, name: str) -> ScheduleRow:
        return self._changed(name, "resume")

    def _changed(self, name: str, verb: str) -> ScheduleRow:
        found: ScheduleRow = self._typed(ScheduleRow, "POST", f"{_path(name)}/{verb}")
        return found

    def remove(self, name: str) -> None:
        self._ask("DELETE", _path(name))

    def trigger(self, name: str) -> FiringRow:
        found: FiringRow = self._typed(FiringRow, "POST", f"{_path(name)}/trigger")
        return found

    def resend(self, name: str) -> int:
        return int(self._ask("POST", f"{_path(name)}/resend")["messages"])


def _path(name: str) -> str:
    return f"/v1/schedules/{quote(name, safe='')}"
