"""A comparison and a verdict on a terminal, or in a file they are piped to."""

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

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
    policy = pair.policy_b if pair.policy_a == pair.policy_b else f"{pair.policy_a} → {pair.policy_b}"
    title = Text(formats.printable(f"{pair.benchmark}, {policy}"), style="bold")
    title.append(f"  {formats.count(pair.samples)} samples", style="dim")
    agreement = pair.agreement
    same = f"The same tokens for {formats.percent(agreement.exact)} of the samples"
    if agreement.median_divergence is not None:
        same += f"; where they differ, half do by token {agreement.median_divergence + 1:g}"
    parts: list[RenderableType] = [title, Text(same + "."), _table(pair.differences)]
    parts += [_flips(one) for one in pair.flips if one.n_lost or one.n_gained]
    return parts + [_note(text) for text in pair.notes]


def _table(differences: list[Difference]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("", min_width=14, overflow="fold")
    for column in ("A", "B", "Change", "Relative", "p", "Would be\nfound"):
        table.add_column(column, justify="right")
    for one in differences:
        is_speed = one.kind == "speed"
        write = formats.milliseconds if is_speed else formats.score
        name = Text(formats.printable(one.metric))
        if is_speed:
            name.append(f"\n{formats.printable(str(one.device_class))}\n{_floor(one)}", style="dim")
        table.add_row(
            name,
            write(one.a),
            write(one.b),
            formats.ABSENT if is_speed else _with_interval(formats.signed(one.change.value), one.change),
            _with_interval(signed_percent(one.relative.value), one.relative, relative=True),
            _p(one),
            formats.percent(one.detectable_relative) if one.detectable_relative is not None else formats.ABSENT,
        )
    return table


def signed_percent(share: float | None) -> str:
    """A change in percent, always with its sign."""
    if share is None:
        return formats.ABSENT
    written = formats.percent(share)
    return f"+{written}" if share > 0 and written != "0.0%" else written


def signed_percents(estimate: Estimate) -> str:
    """An interval of such; empty where there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{signed_percent(estimate.low)} to {signed_percent(estimate.high)}"


def _with_interval(value: str, estimate: Estimate, *, relative: bool = False) -> Text:
    interval = signed_percents(estimate) if relative else formats.signed_interval(estimate)
    return Text(value).append(f"\n{interval}", style="dim") if interval else Text(value)


def _p(one: Difference) -> Text:
    if one.p_holm is None:
        return Text(formats.ABSENT)
    written = "<0.001" if one.p_holm < 0.001 else f"{one.p_holm:.3f}"
    found = one.p_holm <= 0.05
    return Text(written, style=("red" if one.is_worse else "green") if found else "")


def _floor(one: Difference) -> str:
    if one.floor is None or one.floor.share is None:
        return "no two runs of one spec are known"
    if not one.floor.pairs:
        return "timed in turns"
    return f"two runs of one spec: up to {formats.percent(one.floor.share)} ({one.floor.pairs} pairs)"


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
