"""`shortstop label`: what judges are given, and what they said."""

import sys
from typing import Annotated

import typer

from cluster.cli.options import DatabaseUrl, JobId, JsonFlag, ServerUrl
from cluster.cli.output import note, print_json
from cluster.cli.start import service, writable
from engine.errors import BadInput


def export(
    job: JobId,
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A .csv or .jsonl file that is not there yet; - writes JSON lines.")
    ] = "-",
    samples: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="So many samples, drawn with the seed; all of them without it."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="What orders the samples.")] = 0,
    database: DatabaseUrl = None,
    server: ServerUrl = None,
) -> None:
    """Write what there is to judge of a job: each text once, and nothing that tells which policy wrote it."""
    from cluster.labels import form_of, lines_of

    form = form_of(file)
    path = None if file == "-" else writable(file)
    if path is not None and path.exists():
        raise BadInput(f"file {file!r} is there already, and somebody may have judged in it; name another one.")
    with service(database, server=server) as shortstop:
        lines = list(lines_of(shortstop.labels(job, samples=samples, seed=seed), form))
    if path is None:
        sys.stdout.writelines(lines)
        return
    path.write_text("".join(lines), encoding="utf-8", newline="")
    note(f"job {job}: {len(lines) - (form == 'csv')} texts to judge in {file}; say 1 or 0 in `accepted`")


def import_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="What `label export` wrote, judged; - reads JSON lines.")],
    judge: Annotated[str, typer.Option(metavar="NAME", help="Who judged.")],
    database: DatabaseUrl = None,
    server: ServerUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Take in what a judge said; a second time nothing changes, and another answer replaces the first."""
    from cluster.labels import checked_judge, job_of, read_judgements

    checked_judge(judge)
    judgements = read_judgements(file)
    job = job_of(judgements)
    with service(database, server=server) as shortstop:
        done = shortstop.import_labels(job, judge, judgements)
    if as_json:
        print_json(done)
    else:
        counts = f"{done.new} new, {done.changed} changed, {done.unchanged} as before"
        print(f"job {done.job}: labels of {done.judge}: {counts}")
