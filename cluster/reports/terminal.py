"""The report on a terminal, or in a file it is piped to: a few tables a benchmark, legible at 100 columns."""

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.reports import formats
from cluster.reports.model import BenchmarkReport, Estimate, JobReport, Overlapping, RunReport, RunSummary, is_slowdown
from cluster.reports.notes import Note, benchmark_notes, headline, job_notes

#: columns where the output is no terminal, so that a piped report reads the same everywhere
PIPED_WIDTH = 100

#: details of a note that are printed; the page and the JSON have all
DETAILS_SHOWN = 3


def print_report(report: JobReport, console: Console | None = None) -> None:
    """Print a report; plain text of 100 columns where the console writes to no terminal."""
    console = console or Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    console.print(render(report))


def render(report: JobReport) -> RenderableType:
    """The report as something that rich prints."""
    parts: list[RenderableType] = [_title(report), *map(_note, job_notes(report))]
    for benchmark in report.benchmarks:
        parts += [Text(), *_benchmark(benchmark)]
    return Group(*parts)


def _title(report: JobReport) -> Text:
    exits = f", exits {report.exits}" if report.exits else ""
    model = f"model {report.model}" if report.model else "no model: all completions were made elsewhere"
    facts = f"  job {report.job_id} · {report.state} · {model}{exits}"
    return Text(formats.printable(report.name), style="bold").append(formats.printable(facts), style="dim")


def _benchmark(benchmark: BenchmarkReport) -> list[RenderableType]:
    name = Text(formats.printable(benchmark.name), style="bold")
    name.append(f"  {formats.count(benchmark.samples)} samples", style="dim")
    lines: list[RenderableType] = [name, Text(formats.printable(headline(benchmark)))]
    lines += [_speed_table(benchmark), _quality_table(benchmark)]
    lines += [_labels_table(benchmark)] if benchmark.judges is not None else []
    lines += [_drafts_table(benchmark)] if benchmark.drafting else []
    lines += [_overlap_table(benchmark.overlap)] if benchmark.overlap and benchmark.overlap.runs else []
    return [*lines, *map(_note, benchmark_notes(benchmark))]


def _speed_table(benchmark: BenchmarkReport) -> Table:
    table = _table("Speed")
    for column in ("Exit layer", "Skipped", "Speedup\nper token", "Ideal", "Efficiency", "Speedup\nper request"):
        table.add_column(column, justify="right")
    for run in benchmark.runs:
        summary, is_baseline = run.summary, run is benchmark.baseline
        table.add_row(
            _policy(run),
            formats.ABSENT if run.is_imported else _depth(summary),
            formats.percent(summary.layers_skipped),
            "baseline" if is_baseline else _speedup(summary.speedup_token),
            formats.times(summary.speedup_ideal),
            formats.percent(summary.efficiency, 0),
            "baseline" if is_baseline else _speedup(summary.speedup_request),
        )
    return table


def _depth(summary: RunSummary) -> str:
    return f"{formats.layer(summary.mean_exit_layer)} / {formats.count(summary.n_layers)}"


def _quality_table(benchmark: BenchmarkReport) -> Table:
    table = _table("Quality")
    for column in ("Samples", "Tokens", "Stops", "ROUGE-L"):
        table.add_column(column, justify="right")
    table.add_column("ROUGE-L\nchange", justify="right", min_width=len("−0.000 to +0.000"))
    if benchmark.original:
        table.add_column("from the\noriginal", justify="right", min_width=len("−0.000 to +0.000"))
    for column in ("EM", "ES", "Accepted\n(proxy)"):
        table.add_column(column, justify="right")
    for run in benchmark.runs:
        summary, is_baseline, change = run.summary, run is benchmark.baseline, run.summary.changed("rouge_l")
        changed = _change(change)
        original = [_from_original(run, benchmark)] if benchmark.original else []
        table.add_row(
            _policy(run),
            formats.count(summary.samples),
            *(formats.ABSENT if run.is_imported else formats.count(n) for n in (summary.tokens, summary.stops)),
            formats.score(summary.metric("rouge_l").value),
            "baseline" if is_baseline else changed,
            *original,
            *(formats.score(summary.metric(name).value) for name in ("em", "es", "accepted")),
        )
    return table


def _change(change: Estimate) -> Text:
    return _two_lines(formats.signed(change.value), formats.signed_interval(change))


def _from_original(run: RunReport, benchmark: BenchmarkReport) -> Text | str:
    """ROUGE-L against the model as it came."""
    if run is benchmark.original:
        return "reference"
    return _change(run.summary.changed_from_original("rouge_l"))


def _labels_table(benchmark: BenchmarkReport) -> Table:
    """What judges said beside the proxy on the same completions, and how well it predicts them."""
    table = _table("Judges")
    for column in ("Judged", "Acceptance\nrate", "Accepted\n(proxy)", "Proxy\nprecision", "Proxy\nrecall"):
        table.add_column(column, justify="right")
    table.add_column("Proxy\nagrees", justify="right")
    for run in benchmark.runs:
        if run.labels is None:
            table.add_row(_policy(run), "0")
            continue
        estimates = (run.labels.acceptance_rate, run.labels.proxy, run.labels.precision, run.labels.recall)
        table.add_row(
            _policy(run),
            formats.count(run.labels.judged),
            *(
                _two_lines(formats.score(one.value), formats.score_interval(one))
                for one in (*estimates, run.labels.agreement)
            ),
        )
    return table


def _drafts_table(benchmark: BenchmarkReport) -> Table:
    table = _table("Drafts")
    for column in ("Drafted", "Kept", "Share kept"):
        table.add_column(column, justify="right")
    for run in benchmark.drafting:
        drafted, kept, share = run.summary.drafted, run.summary.drafts_kept, run.summary.drafts_kept_share
        table.add_row(_policy(run), formats.count(drafted), formats.count(kept), formats.percent(share))
    return table


def _overlap_table(overlap: Overlapping) -> Table:
    """Each metric on the samples that stand in a corpus, and under it on the others."""
    table = _table("Overlap")
    names = list(overlap.runs[0].others)
    for name in ("Samples", *names):
        table.add_column(name, justify="right")
    for run in overlap.runs:
        for title, scores in (("in the corpus", run.flagged), ("others", run.others)):
            cells = [
                _two_lines(formats.score(one.value), formats.score_interval(one))
                for one in map(scores.get, names)
                if one
            ]
            table.add_row(Text(formats.printable(run.policy)), title, *cells)
    return table


def _table(title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column(title, min_width=16, max_width=30, overflow="fold")
    return table


def _policy(run: RunReport) -> Text:
    return Text(formats.printable(run.policy))


def _speedup(estimate: Estimate) -> Text:
    """The value, and under it its interval and the word that it is a slowdown."""
    if not is_slowdown(estimate):
        return _two_lines(formats.times(estimate.value), formats.times_interval(estimate))
    cell = Text(f"slowdown {formats.times(estimate.value)}", style="red")
    interval = formats.times_interval(estimate)
    return cell.append(f"\n{interval}", style="dim") if interval else cell


def _two_lines(value: str, interval: str) -> Text:
    return Text(value).append(f"\n{interval}", style="dim") if interval else Text(value)


def _note(note: Note) -> RenderableType:
    mark, style = ("!", "yellow") if note.weight == "caution" else ("·", "dim")
    line = Table.grid(padding=(0, 1))
    line.add_column(no_wrap=True)
    line.add_column()
    line.add_row(Text(mark, style=style), Text(formats.printable(note.text), style=style))
    for detail in _shortened(note.details):
        line.add_row(Text(), Text(formats.printable(detail), style=style))
    return line


def _shortened(details: tuple[str, ...]) -> list[str]:
    more = len(details) - DETAILS_SHOWN
    return [*details[:DETAILS_SHOWN], *([f"and {formats.count(more)} more"] if more > 0 else [])]
