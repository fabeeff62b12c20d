"""When a schedule fires: through changes of the clocks, and the same whoever asks from wherever."""

from datetime import datetime
from functools import cache
from itertools import islice, takewhile
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.schedules.cron import moments, next_moment

BERLIN = "Europe/Berlin"


def local(at: float, zone: str = BERLIN) -> str:
    return datetime.fromtimestamp(at, ZoneInfo(zone)).strftime("%m-%d %H:%M %z")


def at(written: str, zone: str = BERLIN, fold: int = 0) -> float:
    return datetime.fromisoformat(written).replace(tzinfo=ZoneInfo(zone), fold=fold).timestamp()


def first(cron: str, after: float, count: int = 3) -> list[str]:
    return [local(moment) for moment in islice(moments(cron, BERLIN, after), count)]


def test_a_time_that_is_left_out_is_made_up_for_right_afterwards() -> None:
    """Clocks went from 2:00 to 3:00 on 29 March 2026."""
    before = at("2026-03-28T12:00")
    assert first("30 2 * * *", before) == ["03-29 03:00 +0200", "03-30 02:30 +0200", "03-31 02:30 +0200"]
    assert first("0,30 2 * * *", before) == ["03-29 03:00 +0200", "03-30 02:00 +0200", "03-30 02:30 +0200"]
    assert first("0 * * * *", at("2026-03-29T00:30")) == ["03-29 01:00 +0100", "03-29 03:00 +0200", "03-29 04:00 +0200"]


def test_a_time_that_comes_twice_counts_once() -> None:
    """Clocks went from 3:00 back to 2:00 on 25 October 2026."""
    before = at("2026-10-24T12:00")
    assert first("30 2 * * *", before) == ["10-25 02:30 +0200", "10-26 02:30 +0100", "10-27 02:30 +0100"]
    # asked in the hour that comes again: the time was used up in the first
    assert first("30 2 * * *", at("2026-10-25T02:10", fold=1), 1) == ["10-26 02:30 +0100"]
    hourly = ["10-25 02:00 +0200", "10-25 02:00 +0100", "10-25 03:00 +0100"]
    assert first("0 * * * *", at("2026-10-25T01:30")) == hourly


@cache
def moments_of_a_year(cron: str, zone: str, start: float) -> list[float]:
    """And of a month more."""
    return list(takewhile(lambda moment: moment <= start + 400 * 86_400, moments(cron, zone, start)))


@pytest.mark.parametrize(
    ("cron", "zone"),
    [
        ("30 2 * * *", BERLIN),
        ("*/20 1-3 * * *", "America/New_York"),
        ("15 2 * * SUN", "Australia/Lord_Howe"),  # clocks change by half an hour
        ("0 0 * * *", "America/Havana"),  # they change at midnight
        ("0 3 L * *", "Pacific/Apia"),
    ],
)
@given(st.integers(0, 365 * 24 * 60))
def test_who_asks_from_anywhere_gets_the_same_moments(cron: str, zone: str, minutes: int) -> None:
    """So that it does not matter when, and by whom, the next moment is worked out."""
    start = at("2026-01-01T00:00", "UTC")
    whole = moments_of_a_year(cron, zone, start)
    assert whole == sorted(set(whole))
    asked = start + minutes * 60.0
    assert next_moment(cron, zone, asked) == next((moment for moment in whole if moment > asked), None)


def test_there_is_an_end() -> None:
    start = at("2026-01-01T00:00")
    assert next_moment("0 2 * * *", BERLIN, start, start + 1) is None
    assert next_moment("0 2 * * *", BERLIN, start, start + 7200) == start + 7200
