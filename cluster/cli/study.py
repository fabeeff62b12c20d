"""`shortstop study`: where tokens become right, which never do, and what is written behind those."""

from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.finished import Execute
from cluster.cli.options import DatabaseUrl, Inline, JobId, JsonFlag, Workers
from cluster.cli.output import note, print_json, print_table
from cluster.cli.start import opened, start, writable
from cluster.cli.traces import BenchmarkName
from engine.errors import BadInput

if TYPE_CHECKING:
    from cluster.study.continued import Continued
    from cluster.study.counting import Share, Slice
    from cluster.study.report import Study

ContinueFrom = Annotated[
    int | None,
    typer.Option("--continue", metavar="N", min=1, help="Generate from wrong and right tokens of so many samples."),
]

ContinuedBefore = Annotated[
    int | None,
    typer.Option("--continued", metavar="JOB", help="What --continue made before, with the labels it has by now."),
]


def study(
    job: JobId,
    benchmark: BenchmarkName = None,
    continue_from: ContinueFrom = None,
    continued: ContinuedBefore = None,
    execute: Execute = False,
    html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Write the pictures as a page.")] = None,
    workers: Workers = None,
    inline: Inline = False,
    database: DatabaseUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """The paper's first half for a trace: who is right first, who is right, what never is, and how exits agree."""
    from cluster.cli.progress import show_job, watch
    from cluster.study.report import study as studied
    from cluster.traced import traces_of

    if execute and continue_from is None:
        raise BadInput("--execute runs what is generated, and nothing is; give --continue N as well.")
    if continued is not None and continue_from is not None:
        raise BadInput("--continue generates and --continued looks at what is there; give one of them.")
    page, settings = writable(html), start(database, workers)
    with opened(settings, create=False) as db:
        traces = traces_of(db, job, benchmark)
        if len(traces) > 1 and continued is not None:
            names = ", ".join(repr(one.run.benchmark) for one in traces)
            raise BadInput(f"--continued is of one benchmark; name one of {names} by --benchmark.")
        with watch() as shown:
            found = [
                studied(
                    trace,
                    settings,
                    continue_samples=continue_from,
                    continued_job=continued,
                    execute=execute,
                    inline=inline,
                    on_progress=lambda done: shown.show("counting", done, 0, "samples"),
                    on_live=lambda now: show_job(shown, now),
                )
                for trace in traces
            ]
    if page is not None:
        from cluster.reports.study_page import write_study_page

        write_study_page(found, page)
        note(f"page written to {page}")
    if as_json:
        print_json([one.as_json() for one in found])
        return
    for one in found:
        _print(one)


def _print(found: "Study") -> None:
    counted, of = found.counted, f"layer {found.n_layers}"
    print(
        f"job {found.job_id}, {found.benchmark}, {found.model}: {counted.overall.tokens:,} tokens of "
        f"{counted.samples:,} samples, {counted.groups:,} source groups, target {found.target}\n"
    )
    layers = [str(point) for point in counted.points[:-1]] + [f"{of}, full depth"]
    shares = zip(layers, counted.overall.first_right, counted.overall.right, strict=True)
    print_table(["exit point", "first right", "right"], [[name, _cell(one), _cell(two)] for name, one, two in shares])
    print(f"\nwrong at every exit point: {_cell(counted.overall.never)}\n")
    for what, slices in (("language", counted.languages), ("kind", counted.kinds), ("position", counted.positions)):
        if len(slices) > 1:
            first = str(counted.points[0])
            print_table(
                [what, "tokens", f"first right at {first}", "right at full depth", "never right"],
                [_row(one) for one in slices],
            )
            print()
    if found.continued is not None:
        _print_continued(found.continued)


def _row(one: "Slice") -> list[str]:
    return [one.name, f"{one.tokens:,}", _cell(one.first_right[0]), _cell(one.right[-1]), _cell(one.never)]


def _print_continued(found: "Continued") -> None:
    from cluster.study.continued import judged_by, named

    names = sorted({*found.wrong.scores, *found.right.scores})
    arms = (found.wrong, found.right)
    print_table(
        ["continued from", "completions", *map(named, names)],
        [[f"a {arm.arm} token", arm.completions, *(_cell(arm.scores.get(name)) for name in names)] for arm in arms],
    )
    print(f"\njob {found.job_id}; {judged_by(found)}\n")


def _cell(one: "Share | None") -> str:
    from cluster.reports.formats import ABSENT, percent

    if one is None:
        return ABSENT
    interval = "" if one.low is None else f" ({percent(one.low)}–{percent(one.high)})"
    return percent(one.value) + interval
