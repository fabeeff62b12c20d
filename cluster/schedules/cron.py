"""When a cron expression fires in a time zone, through daylight-saving changes as Debian's cron does it.

A fixed time that a change leaves out is made up for right after it; one that comes twice fires the first time. What
recurs within the hour (`*/10 * * * *`, `0 * * * *`) follows the time that has passed.
"""

from collections.abc import Iterator
from datetime import datetime
from difflib import get_close_matches
from functools import lru_cache
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

from engine.errors import BadInput

#: of an expression, and what may stand there
FIELDS = {
    "minute": "0-59",
    "hour": "0-23",
    "day-of-month": "1-31, or L for the last, and one that the months have",
    "month": "1-12, or JAN-DEC",
    "day-of-week": "0-7 with Sunday as 0 and 7, or SUN-SAT",
}
_LONGEST = 200


def check_cron(expression: str) -> None:
    """Raises `BadInput`, with the part that is wrong, and for what never fires."""
    parts = expression.split()
    if len(expression) > _LONGEST:
        raise BadInput(
            f"cron has {len(expression)} characters; write up to {_LONGEST}, as several schedules if needed."
        )
    if len(parts) != len(FIELDS):
        raise BadInput(
            f"cron {expression!r} has {len(parts)} parts; write five: {', '.join(FIELDS)}, like '0 2 * * *'."
        )
    try:
        simulated = CronSim(expression, datetime(2024, 1, 1, tzinfo=ZoneInfo("UTC")))
    except CronSimError as error:
        name = str(error).removeprefix("Bad ")
        part = parts[list(FIELDS).index(name)]
        raise BadInput(
            f"cron {expression!r}: {part!r} is no {name}; write {FIELDS[name]}, *, a-b, a,b or */n."
        ) from None
    if next(simulated, None) is None:
        raise BadInput(f"cron {expression!r} never fires; correct its day-of-month and its month.")


def check_zone(name: str) -> None:
    """Raises `BadInput`, with the nearest name that is known."""
    known = _zones()
    if name in known:
        return
    lower = {zone.lower(): zone for zone in known}
    near = get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    cities = get_close_matches(name.lower(), [zone.rsplit("/", 1)[-1] for zone in lower], n=1, cutoff=0.8)
    if cities and not any(zone.endswith(cities[0]) for zone in near):
        near = [next(zone for zone in sorted(lower) if zone.rsplit("/", 1)[-1] == cities[0])]
    hint = f"did you mean {lower[near[0]]!r}?" if near else "write a name such as Europe/Berlin, or UTC."
    raise BadInput(f"unknown zone {name!r}; {hint}")


@lru_cache(1)
def _zones() -> frozenset[str]:
    return frozenset(available_timezones())


def moments(expression: str, zone: str, after: float) -> Iterator[float]:
    """The moments after this one (seconds since 1970), rising, as far as there are any within fifty years."""
    last = after
    for found in CronSim(expression, datetime.fromtimestamp(after, ZoneInfo(zone))):
        at = found.timestamp()
        # two times of a day may be made up for at one moment, and an hour that comes twice begins anew
        if at > last:
            last = at
            yield at


def next_moment(expression: str, zone: str, after: float, end: float | None = None) -> float | None:
    """The first moment after this one, up to and including the end; None where there is none."""
    found = next(moments(expression, zone, after), None)
    return None if found is None or (end is not None and found > end) else found
