"""How reports write numbers: the same on the terminal and on the page."""

from datetime import UTC, datetime

from cluster.reports.model import Estimate

ABSENT = "–"


def count(value: int | None) -> str:
    """A whole number, in groups of three digits."""
    return ABSENT if value is None else f"{value:,}"


def times(value: float | None) -> str:
    """A speedup: 1.25×."""
    return ABSENT if value is None else f"{value:.2f}×"


def percent(share: float | None, digits: int = 1) -> str:
    """A share of 1 in percent, with a true minus."""
    return ABSENT if share is None else _minus(f"{100 * share:.{digits}f}%")


def layer(value: float | None) -> str:
    """A mean number of layers."""
    return ABSENT if value is None else f"{value:.1f}"


def score(value: float | None) -> str:
    """A metric between 0 and 1."""
    return ABSENT if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """A change of a metric, always with its sign; what rounds to nothing has none."""
    if value is None:
        return ABSENT
    written = f"{value:+.3f}"
    return "0.000" if float(written) == 0 else _minus(written)


def times_interval(estimate: Estimate) -> str:
    """1.20–1.30; empty where there is no interval."""
    return "" if not _has_interval(estimate) else f"{estimate.low:.2f}–{estimate.high:.2f}"


def score_interval(estimate: Estimate) -> str:
    """0.610–0.652; empty where there is no interval."""
    return "" if not _has_interval(estimate) else f"{estimate.low:.3f}–{estimate.high:.3f}"


def signed_interval(estimate: Estimate) -> str:
    """−0.020 to 0.003: a dash between numbers that have signs misleads."""
    return "" if not _has_interval(estimate) else f"{signed(estimate.low)} to {signed(estimate.high)}"


def moment(seconds: float | None) -> str:
    """Seconds since 1970 as a date and time in UTC."""
    return ABSENT if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%-d %B %Y, %H:%M UTC")


def duration(seconds: float | None) -> str:
    """6 min 20 s; seconds to one digit below a minute."""
    if seconds is None:
        return ABSENT
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def milliseconds(value: float | None) -> str:
    """A short time, to a tenth of a millisecond."""
    return ABSENT if value is None else f"{value:,.1f} ms"


def rate(value: float | None) -> str:
    """Tokens in a second."""
    return ABSENT if value is None else f"{value:,.1f}"


def gigaflops(operations: int) -> str:
    """Floating point operations in billions."""
    return f"{operations / 1e9:,.1f}"


def printable(text: str) -> str:
    """One line in which no character can move a terminal's cursor or change its colours."""
    return "".join(char if char.isprintable() else "�" for char in text)


def visible(text: str) -> str:
    """Code in which control characters can be seen; those that would turn the reading direction do so no more."""
    return text.translate(_PICTURES)


#: control characters as their pictures (line ends and tabs stay), bidirectional controls as the replacement character
_PICTURES = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"},
    0x7F: "\u2421",
    **dict.fromkeys([0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd"),
}


def _has_interval(estimate: Estimate) -> bool:
    return estimate.low is not None and estimate.high is not None


def _minus(written: str) -> str:
    return written.replace("-", "−")
