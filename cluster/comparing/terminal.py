"""A comparison and a verdict on a terminal, or in a file they are piped to."""

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.comparing import words
from cluster.comparing.model import Comparison, Difference, Flip, Flips, PairComparison
from cluster.gates import Outcome, Verdict
from cluster.reports import formats
from cluster.reports.model import Estimate
from cluster.reports.terminal import PIPED_WIDTH

#: samples of each list of flips that are printed; the page and the JSON have more
_FLIPS_SHOWN = 5
_STYLES = {Outcome.PASS: "green", Outcome.FAIL: "red", Outcome.INCONCLUSIVE: "yellow"}


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print what changed; plain text of 100 columns where the console writes to no terminal."""
    _print(_comparison(comparison), console)


def print_verdict(verdict: Verdict, console: Console | None = None) -> None:
    """Print what a gate says, and why."""
    _print(_verdict(verdict), console)


def _print(what: RenderableType, console: Console | None) -> None:
    console = console or Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    console.print(what)


def _comparison(found: Comparison) -> RenderableType:
    title = f"{found.a.asked} ({found.a.name}) → {found.b.asked} ({found.b.name})"
    level = f"  intervals at {100 * found.confidence:g} %, p-values corrected for {len(found.differences)} differences"
    parts: list[RenderableType] = [Text(formats.printable(title), style="bold").append(level, style="dim")]
    parts += [_note(f"{one.what}: {one.a} → {one.b}") for one in found.changed]
    parts += [_note(text) for text in found.notes]
    for pair in found.pairs:
        parts += [Text(), *_pair(pair)]
    return Group(*parts)


def _pair(pair: PairComparison) -> list[RenderableType]:
    title = Text(formats.printable(f"{pair.benchmark}, {words.policies(pair)}"), style="bold")
    title.append(f"  {formats.count(pair.samples)} samples", style="dim")
    parts: list[RenderableType] = [title, Text(formats.printable(words.headline(pair)))]
    parts += [Text(words.agreement(pair)), _table(pair.differences)]
    parts += [
        _note(f"{one.metric}, {one.device_class}: {words.floor(one)}")
        for one in pair.differences
        if one.kind == "speed"
    ]
    parts += [_flips(one) for one in pair.flips if one.n_lost or one.n_gained]
    return parts + [_note(text) for text in pair.notes]


def _table(differences: list[Difference]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("", min_width=14, overflow="fold")
    for column in ("A", "B", "Change", "Relative", "p", "Would be\nfound"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in differences:
        is_speed = one.kind == "speed"
        table.add_row(
            Text(formats.printable(one.metric)),
            words.value(one, one.a),
            words.value(one, one.b),
            formats.ABSENT if is_speed else _with_interval(formats.signed(one.change.value), one.change),
            _with_interval(words.signed_percent(one.relative.value), one.relative, relative=True),
            _p(one),
            formats.percent(one.detectable_relative or None),
        )
    return table


def _with_interval(value: str, estimate: Estimate, *, relative: bool = False) -> Text:
    interval = words.signed_percents(estimate) if relative else formats.signed_interval(estimate)
    return Text(value).append(f"\n{interval}", style="dim") if interval else Text(value)


def _p(one: Difference) -> Text:
    return Text(words.p_value(one.p_holm), style={"worse": "red", "better": "green"}.get(words.standing(one), ""))


def _flips(one: Flips) -> RenderableType:
    return Text(
        formats.printable(
            f"{one.metric}: {formats.count(one.n_lost)} lost{_names(one.lost, one.n_lost)}, "
            f"{formats.count(one.n_gained)} gained{_names(one.gained, one.n_gained)}"
        )
    )


def _names(flips: list[Flip], count: int) -> str:
    if not flips:
        return ""
    more = ", …" if count > _FLIPS_SHOWN else ""
    return f" ({', '.join(one.sample for one in flips[:_FLIPS_SHOWN])}{more})"


def _verdict(verdict: Verdict) -> RenderableType:
    parts: list[RenderableType] = [
        Text(str(verdict.outcome), style=f"bold {_STYLES[verdict.outcome]}"),
        Text(formats.printable(verdict.sentence)),
    ]
    if verdict.confirmation:
        parts.append(Text(formats.printable(verdict.confirmation)))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for one in verdict.rules:
        table.add_row(Text(str(one.outcome), style=_STYLES[one.outcome]), Text(formats.printable(one.sentence)))
    return Group(*parts, Text(), table) if len(verdict.rules) > 1 else Group(*parts)


def _note(text: str) -> Text:
    return Text(formats.printable(f"· {text}"), style="dim")
