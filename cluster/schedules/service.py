"""What whoever asks may do with schedules: on a database at hand (`keeping.py`) or over HTTP (`remote.py`)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from db.incidents import IncidentRow, MessageRow
from db.schedules import FiringRow, ScheduleRow

if TYPE_CHECKING:
    from cluster.schedules.spec import ScheduleSpec


@dataclass(frozen=True)
class ScheduleSummary:
    """A line of the list of schedules."""

    schedule: ScheduleRow
    last: FiringRow | None  #: the newest that has a job or was refused
    incident: IncidentRow | None  #: the one that is open


@dataclass(frozen=True)
class ScheduleDetails:
    """All that is told of one schedule."""

    schedule: ScheduleRow
    incident: IncidentRow | None
    firings: list[FiringRow]  #: newest first
    messages: list[MessageRow]  #: to its webhooks, newest first


@dataclass(frozen=True)
class AddedSchedule:
    """A schedule that was written."""

    schedule: ScheduleRow
    secrets: dict[str, str]  #: by webhook: what its messages are signed with; shown this once


class Schedules(ABC):
    """Every method raises `BadInput` (of engine or db): one sentence, and nothing was changed."""

    @abstractmethod
    def add(self, spec: "ScheduleSpec", folder: Path | None = None) -> AddedSchedule:
        """Check a schedule as far as its job, and write it. folder: what relative paths of the job start from."""

    @abstractmethod
    def list(self) -> list[ScheduleSummary]:
        """By name."""

    @abstractmethod
    def show(self, name: str, *, limit: int = 50) -> ScheduleDetails:
        """One schedule with its newest firings and messages. Raises `Missing`."""

    @abstractmethod
    def pause(self, name: str) -> ScheduleRow:
        """Let it fire no more; a job that it began goes on."""

    @abstractmethod
    def resume(self, name: str) -> ScheduleRow:
        """Let it fire again, from now on: what fell into the pause is not made up for."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove it with its history; its jobs stay."""

    @abstractmethod
    def trigger(self, name: str) -> FiringRow:
        """Fire now, paused or not. Raises `Conflict` where one before has not ended and the schedule skips."""

    @abstractmethod
    def resend(self, name: str) -> int:
        """Send again what its webhooks did not take, dead letters included. Returns how many messages."""
