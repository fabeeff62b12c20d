"""Commands about jobs: submit and work, watch, report."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cluster.cli.options import DatabaseUrl, HtmlFile, Inline, JobId, JsonFlag, Overrides, SpecFile, Workers
from cluster.cli.output import note, print_json, print_table
from cluster.cli.start import opened, start, writable

if TYPE_CHECKING:
    from cluster.settings import Settings
    from db.records import JobState
    from db.session import Database


def run(
    spec: SpecFile,
    overrides: Overrides = None,
    workers: Workers = None,
    inline: Inline = False,
    html: HtmlFile = None,
    database: DatabaseUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Submit a job, work on it, report."""
    from cluster import jobs
    from cluster.spec import read_job

    settings, page = start(database, workers), writable(html)
    asked = jobs.anchored(read_job(spec, overrides or []), spec_folder(spec))
    jobs.validate(asked)  # before there is a job, or a database
    with opened(settings) as db:
        job_id = jobs.submit(db, asked)
        note(f"job {job_id}: submitted")
        state = _work(db, job_id, settings, inline, database)
        _report(db, job_id, page, as_json)
        _end(db, job_id, state)


def resume(
    job: JobId,
    workers: Workers = None,
    inline: Inline = False,
    html: HtmlFile = None,
    database: DatabaseUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Go on with a job that was interrupted or failed; report."""
    from db.jobs import resume_job

    settings, page = start(database, workers), writable(html)
    with opened(settings, create=False) as db:
        resume_job(db, job)
        state = _work(db, job, settings, inline, database)
        _report(db, job, page, as_json)
        _end(db, job, state)


def validate(spec: SpecFile, overrides: Overrides = None, as_json: JsonFlag = False) -> None:
    """Check a spec and say what its job would do."""
    from cluster import jobs
    from cluster.spec import read_job

    workers = start().workers
    asked = jobs.anchored(read_job(spec, overrides or []), spec_folder(spec))
    found = jobs.validate(asked, workers=workers)
    if as_json:
        print_json(found)
        return
    exits = f", exits {found.exits} after layers {', '.join(map(str, found.exit_points))}" if found.exits else ""
    print(f"model {found.model}, {found.n_layers} layers{exits}\npolicies {', '.join(found.policies)}")
    print(f"batch size {found.batch_size}{' (auto)' if asked.generation.batch_size == 'auto' else ''}\n")
    columns = ("benchmark", "version", "samples", "batches", "shards", "left out")
    print_table(
        columns,
        [(row.name, row.version, row.samples, row.batches, row.shards, len(row.left_out)) for row in found.benchmarks],
    )


def list_jobs(database: DatabaseUrl = None, as_json: JsonFlag = False) -> None:
    """The jobs in the database, newest first."""
    from cluster.reports.formats import moment
    from db.jobs import list_jobs

    with opened(start(database), create=False) as db:
        rows = list_jobs(db)
    if as_json:
        print_json(rows)
        return
    columns = ("job", "name", "state", "model", "created", "finished")
    print_table(
        columns,
        [
            (row.id, row.name, row.state, row.spec["model"], moment(row.created_at), moment(row.finished_at))
            for row in rows
        ],
    )


def show(job: JobId, database: DatabaseUrl = None, as_json: JsonFlag = False) -> None:
    """One job: its state, how far it is, its spec."""
    from db.jobs import job as read_row
    from db.jobs import progress, runs

    with opened(start(database), create=False) as db:
        row, state, its_runs = read_row(db, job), progress(db, job), runs(db, job)
    if as_json:
        print_json({"job": row, "progress": state, "runs": its_runs})
        return
    shards = ", ".join(f"{count} {name}" for name, count in state.shards.items() if count)
    facts = [
        ("job", f"{row.id} {row.name}"),
        ("state", row.state),
        ("batches", f"{state.batches_done} of {state.batches_total}"),
        ("shards", shards or "none yet"),
        ("errors", state.errors),
        ("runs", ", ".join(f"{run.benchmark} / {run.policy}" for run in its_runs) or "none yet"),
        ("reason", row.error or state.last_error),
    ]
    print_table(("", ""), [fact for fact in facts if fact[1] is not None])
    print(_yaml(row.spec), end="")


def report(job: JobId, html: HtmlFile = None, database: DatabaseUrl = None, as_json: JsonFlag = False) -> None:
    """The report of a job, finished or under way."""
    settings, page = start(database), writable(html)
    with opened(settings, create=False) as db:
        _report(db, job, page, as_json)


def spec_folder(spec: str) -> Path:
    """The folder that relative paths in a spec start from: the file's, or this one for standard input."""
    return Path.cwd() if spec == "-" else Path(spec).absolute().parent


def _work(db: "Database", job_id: int, settings: "Settings", inline: bool, database: str | None) -> "JobState":
    """Work until the job has ended. Ctrl-C ends the command with the one that goes on."""
    from cluster import jobs
    from cluster.cli.progress import show_job, watch

    try:
        with watch() as shown:
            return jobs.work(
                db,
                job_id,
                workers=settings.workers,
                inline=inline,
                lease_seconds=settings.lease_seconds,
                on_progress=lambda now: show_job(shown, now),
            )
    except KeyboardInterrupt:
        option = f" --database {database}" if database else ""
        note(f"job {job_id}: interrupted; go on with `shortstop resume {job_id}{option}`")
        raise typer.Exit(130) from None


def _end(db: "Database", job_id: int, state: "JobState") -> None:
    """The exit code of a job that is not done, and why it is not."""
    from db.jobs import JobState, job

    if state is not JobState.DONE:
        reason = job(db, job_id).error
        note(f"shortstop: job {job_id} {state}{f': {reason}' if reason else ''}")
        raise typer.Exit(1)


def _report(db: "Database", job_id: int, page: Path | None, as_json: bool) -> None:
    from cluster.reports.build import build_report
    from cluster.reports.decoder import decoder

    found = build_report(db, job_id, decoder(db, job_id) if page or as_json else None)
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        from cluster.reports.terminal import print_report

        print_report(found)
    if page is not None:
        from cluster.reports.page import write_page

        write_page(found, page)
        note(f"report written to {page}")


def _yaml(spec: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(spec, sort_keys=False, allow_unicode=True, default_flow_style=None)
