"""ScheduleSpec: what a schedule file says. No torch, no Ray, no database here."""

import re
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from pydantic import Field, ValidationError, field_validator, model_validator

from cluster.gates import Gate, parse_gate
from cluster.schedules.cron import check_cron, check_zone
from cluster.spec import JobSpec, complaint, override, parse_job, read_yaml
from engine.errors import BadInput
from engine.spec import Spec

LAST_PASSED = "last-passed"
_NAME = re.compile(r"[\w.@+-]{1,100}")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_MOST_WEBHOOKS = 10


class Baseline(Spec):
    """What a firing is held against: one job, the last that passed, or of the last n the one in the middle."""

    job: int | None = Field(None, ge=1)
    median: int | None = Field(None, ge=2, le=50)

    @model_validator(mode="after")
    def _at_most_one(self) -> "Baseline":
        if self.job is not None and self.median is not None:
            raise ValueError("baseline: it has a job and a median; give one of them.")
        return self

    @property
    def label(self) -> str:
        """As people read it."""
        if self.job is not None:
            return f"job {self.job}"
        return "the last that passed" if self.median is None else f"the median of the last {self.median}"

    def dump(self) -> Any:
        """As a file says it."""
        given = self.model_dump(exclude_none=True)
        return given or LAST_PASSED


class ScheduleSpec(Spec):
    """A job that recurs, the gate that it must pass, and who is told."""

    name: str
    cron: str = Field(description="five parts: minute, hour, day-of-month, month, day-of-week")
    zone: str = "UTC"
    overlap: Literal["skip", "queue", "allow"] = Field("skip", description="while an earlier firing has not ended")
    catch_up: str = Field("12h", description="how late a firing may be that nobody was there for")
    ends: str | None = Field(None, description="the last day, or moment, in the schedule's zone")
    job: Any
    gate: Any = None
    baseline: Baseline = Baseline()
    webhooks: list[str] = Field([], max_length=_MOST_WEBHOOKS)

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name) or name in (".", ".."):
            raise ValueError(f"name {name!r}: give 1 to 100 letters, digits or . _ @ + -.")
        return name

    @field_validator("cron")
    @classmethod
    def _check_cron(cls, written: str) -> str:
        check_cron(written)
        return written

    @field_validator("zone")
    @classmethod
    def _check_zone(cls, name: str) -> str:
        check_zone(name)
        return name

    @field_validator("catch_up")
    @classmethod
    def _check_age(cls, age: str) -> str:
        _seconds(age)
        return age

    @field_validator("ends", mode="before")
    @classmethod
    def _read_end(cls, value: Any) -> Any:
        """YAML reads a bare date as one."""
        if isinstance(value, date):
            value = value.isoformat()
        if isinstance(value, str):
            _end(value, ZoneInfo("UTC"))
        return value

    @field_validator("job")
    @classmethod
    def _read_job(cls, value: Any) -> JobSpec:
        try:
            return parse_job(value)
        except BadInput as error:
            raise ValueError(f"job: {str(error).removeprefix('spec: ')}") from None

    @field_validator("gate")
    @classmethod
    def _read_gate(cls, value: Any) -> Gate | None:
        try:
            return None if value is None else parse_gate(value)
        except BadInput as error:
            raise ValueError(f"gate: {str(error).removeprefix('gate: ')}") from None

    @field_validator("baseline", mode="before")
    @classmethod
    def _read_baseline(cls, value: Any) -> Any:
        if value in (None, LAST_PASSED):
            return Baseline()
        if isinstance(value, Baseline | dict) and value:
            return value
        raise ValueError(f"baseline is {value!r}; give {LAST_PASSED}, or {{job: 12}}, or {{median: 5}}.")

    @field_validator("webhooks")
    @classmethod
    def _check_webhooks(cls, urls: list[str]) -> list[str]:
        for url in urls:
            check_url(url)
        if len(set(urls)) < len(urls):
            raise ValueError(f"webhooks: {max(urls, key=urls.count)!r} is there twice; remove one.")
        return urls

    @property
    def catch_up_s(self) -> float:
        """Seconds."""
        return _seconds(self.catch_up)

    @property
    def end(self) -> float | None:
        """The last moment at which it may fire, in seconds since 1970; a day counts to its end."""
        return None if self.ends is None else _end(self.ends, ZoneInfo(self.zone))

    def dump(self) -> dict[str, Any]:
        """The spec as JSON that `ScheduleSpec` reads back."""
        return self.model_dump(mode="json", exclude={"job", "gate", "baseline"}) | {
            "job": self.job.dump(),
            "gate": None if self.gate is None else self.gate.model_dump(mode="json", exclude_defaults=True),
            "baseline": self.baseline.dump(),
        }


def parse_schedule(value: Any) -> ScheduleSpec:
    """Check what a schedule file holds. Raises `BadInput`."""
    if isinstance(value, ScheduleSpec):
        return value
    if not isinstance(value, dict):
        raise BadInput(f"schedule: {value!r} is not a mapping; give at least name, cron and job.")
    try:
        return ScheduleSpec.model_validate(value)
    except ValidationError as error:
        raise BadInput(f"schedule: {complaint(error)}") from None


def read_schedule(source: str | Path, overrides: Sequence[str] = ()) -> ScheduleSpec:
    """Read a schedule file (`-` is standard input) and apply overrides. Raises `BadInput`.

    `job` and `gate` may name files instead, relative to this one.
    """
    value = read_yaml(source)
    folder = Path.cwd() if str(source) == "-" else Path(source).absolute().parent
    for field in ("job", "gate"):
        if isinstance(value.get(field), str):
            value = value | {field: read_yaml(folder / value[field])}
    return parse_schedule(override(value, overrides))


def check_url(url: str) -> None:
    """Raises `BadInput` for what cannot be a webhook; whether its address may be called is asked when it is sent to."""
    try:
        parts = urlsplit(url)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_right = False
    if not is_right or len(url) > 2000 or not url.isprintable() or " " in url:
        raise BadInput(f"webhook {url!r} is no URL; write it like https://hooks.example.org/shortstop.")
    if parts.username or parts.password or parts.fragment:
        raise BadInput(f"webhook {url!r}: a URL with a password or a # is not called; leave that out.")


def host_of(url: str) -> tuple[str, bool]:
    """The host of a URL, and whether it is an address already."""
    host = urlsplit(url).hostname or ""
    try:
        ip_address(host)
    except ValueError:
        return host, False
    return host, True


def _seconds(age: str) -> float:
    """Raises `ValueError`."""
    found = re.fullmatch(r"(\d{1,6})([smhdw])", age.strip())
    if found is None:
        raise ValueError(f"catch_up {age!r} is no age; write a number and s, m, h, d or w, like 12h.")
    return float(int(found[1]) * _SECONDS[found[2]])


def _end(written: str, zone: ZoneInfo) -> float:
    """Raises `ValueError`."""
    try:
        if re.fullmatch(r"\d{4}-\d\d-\d\d", written):
            day = date.fromisoformat(written) + timedelta(days=1)
            return datetime.combine(day, time(), zone).timestamp() - 1
        moment = datetime.fromisoformat(written)
        return (moment if moment.tzinfo else moment.replace(tzinfo=zone)).timestamp()
    except (ValueError, OverflowError):
        raise ValueError(f"ends {written!r} is no date; write it like 2027-01-31, or 2027-01-31T18:00.") from None
