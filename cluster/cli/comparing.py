"""Commands that hold one side against another: compare, gate."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.options import DatabaseUrl, Inline, JsonFlag, ServerUrl, Workers
from cluster.cli.output import note
from cluster.cli.start import service, writable

if TYPE_CHECKING:
    from cluster.gates import Gate, Verdict
    from cluster.service import Service
    from db.records import JobState

Side = Annotated[
    str, typer.Argument(metavar="A", help="A job like 12, a policy of it like 12:full, or a run like run:34.")
]
OtherSide = Annotated[
    str | None,
    typer.Argument(metavar="[B]", help="What is held against it; without it the policies of A against its full."),
]
Metrics = Annotated[
    list[str] | None, typer.Option("--metric", metavar="NAME", help="Only this one; may be given several times.")
]
Confidence = Annotated[
    float, typer.Option("--confidence", metavar="P", min=0.5, max=0.9999, help="Of the intervals, two-sided.")
]
GateFile = Annotated[str, typer.Argument(metavar="FILE", help="A gate as YAML; - reads standard input.")]
Confirm = Annotated[
    bool,
    typer.Option(help="Ask again before a failure counts: quality on fresh samples, speed by a rerun."),
]
JunitFile = Annotated[str | None, typer.Option("--junit", metavar="FILE", help="Write the rules as JUnit XML.")]
MarkdownFile = Annotated[
    str | None, typer.Option("--markdown", metavar="FILE", help="Write a comment for a merge request.")
]


def compare(
    a: Side,
    b: OtherSide = None,
    metric: Metrics = None,
    confidence: Confidence = 0.95,
    database: DatabaseUrl = None,
    server: ServerUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Say what changed from A to B, how sure that is, and on which samples."""
    with service(database, server=server) as shortstop:
        found = shortstop.compare(a, b, confidence=confidence, metrics=metric)
    if as_json:
        print(found.model_dump_json(indent=2))
        return
    from cluster.comparing.terminal import print_comparison

    print_comparison(found)


def gate(
    file: GateFile,
    a: Side,
    b: OtherSide = None,
    confirm: Confirm = True,
    junit: JunitFile = None,
    markdown: MarkdownFile = None,
    workers: Workers = None,
    inline: Inline = False,
    database: DatabaseUrl = None,
    server: ServerUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Judge B against A, or the policies of A against its full; ends with 0 (pass), 1 (fail) or 3 (inconclusive)."""
    from cluster.gates import read_gate

    asked, files = read_gate(file), {"junit": writable(junit), "markdown": writable(markdown)}
    with service(database, workers, server, inline=inline) as shortstop:
        verdict = shortstop.judge(asked, a, b)
        if confirm and verdict.failed:
            verdict = _confirmed(shortstop, asked, verdict, inline)
    _write(verdict, files)
    if as_json:
        print(verdict.model_dump_json(indent=2))
    else:
        from cluster.comparing.terminal import print_verdict

        print_verdict(verdict)
    raise typer.Exit(verdict.outcome.exit_code)


def _confirmed(shortstop: "Service", asked: "Gate", verdict: "Verdict", inline: bool) -> "Verdict":
    from cluster.cli.progress import show_job, watch
    from cluster.comparing.confirming import confirm

    def see(job_id: int) -> "JobState":
        note(f"job {job_id}: submitted, to ask again")
        with watch() as shown:
            return shortstop.work(job_id, inline=inline, on_progress=lambda now: show_job(shown, now))

    return confirm(shortstop, asked, verdict, see)


def _write(verdict: "Verdict", files: dict[str, Path | None]) -> None:
    from cluster.comparing import ci

    for name, make in (("junit", ci.junit), ("markdown", ci.markdown)):
        path = files[name]
        if path is not None:
            ci.write(make(verdict), path, name)
            note(f"{name} written to {path}")
