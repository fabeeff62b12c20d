"""Commands about a job that has ended: one more policy, other metrics."""

import sys
from typing import Annotated, Any

import typer

from cluster.cli.jobs import see_through
from cluster.cli.options import DatabaseUrl, HtmlFile, Inline, JobId, JsonFlag, ServerUrl, Workers
from cluster.cli.output import note, print_json
from cluster.cli.start import opened, service, start, writable
from engine.errors import BadInput

PolicyText = Annotated[
    str,
    typer.Argument(
        metavar="POLICY", help="As in a spec, like '{confidence: {threshold: 0.9}}'; - reads standard input."
    ),
]
MetricNames = Annotated[
    list[str] | None,
    typer.Option(
        "--metric", metavar="NAME", help="A metric to add or renew, or `all`; without it all that the job has."
    ),
]
Execute = Annotated[
    bool, typer.Option("--execute", help="Allow metrics that execute completions (pass@1), each in a sandbox.")
]


def add_policy(
    job: JobId,
    policy: PolicyText,
    workers: Workers = None,
    inline: Inline = False,
    html: HtmlFile = None,
    database: DatabaseUrl = None,
    server: ServerUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Add a policy to a job that is done, compute only its runs, report."""
    page = writable(html)
    with service(database, workers, server, inline=inline) as shortstop:
        label = shortstop.add_policy(job, read_policy(policy))
        note(f"job {job}: {label} added")
        see_through(shortstop, job, inline, database, server, page, as_json)


def rescore(
    job: JobId,
    metric: MetricNames = None,
    execute: Execute = False,
    database: DatabaseUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Score a finished job's completions again, without computing any."""
    from cluster import rescoring
    from cluster.cli.progress import watch

    with opened(start(database), create=False) as db, watch() as shown:
        done = rescoring.rescore(
            db,
            job,
            metric,
            execute=execute,
            on_progress=lambda ended, total: shown.show("scoring", ended, total, "samples"),
        )
    if as_json:
        print_json(done)
        return
    print(f"job {job}: {done.completions} completions scored, revision {done.revision}")
    for version in done.metrics.values():
        print(version)


def read_policy(text: str) -> Any:
    """What an argument, or standard input where it is `-`, says in YAML. Raises `BadInput`."""
    import yaml

    try:
        return yaml.safe_load(sys.stdin.read() if text == "-" else text)
    except (yaml.YAMLError, UnicodeDecodeError):
        raise BadInput(f"policy {text!r} is not YAML; write it like '{{confidence: {{threshold: 0.9}}}}'.") from None
