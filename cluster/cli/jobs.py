"""Commands about jobs: submit and work, watch, report."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cluster.cli.options import (
    DatabaseUrl,
    GpusPerWorker,
    HtmlFile,
    Inline,
    JobId,
    JsonFlag,
    Key,
    Overrides,
    RayAddress,
    SpecFile,
    Workers,
)
from cluster.cli.output import note, print_json, print_table
from cluster.cli.start import opened, start, writable

if TYPE_CHECKING:
    from cluster.settings import Settings
    from db.records import DeadTask, JobRow, JobState
    from db.session import Database


def run(
    spec: SpecFile,
    overrides: Overrides = None,
    workers: Workers = None,
    inline: Inline = False,
    ray_address: RayAddress = None,
    gpus_per_worker: GpusPerWorker = None,
    html: HtmlFile = None,
    database: DatabaseUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Submit a job, work on it, report."""
    from cluster import jobs
    from cluster.spec import read_job

    settings, page = start(database, workers, ray_address, gpus_per_worker), writable(html)
    asked = jobs.anchored(read_job(spec, overrides or []), spec_folder(spec))
    jobs.validate(asked)  # before there is a job, or a database
    with opened(settings) as db:
        job_id = jobs.submit(db, asked)
        note(f"job {job_id}: submitted")
        state = work_on(db, job_id, settings, inline, database)
        print_job_report(db, job_id, page, as_json)
        end(db, job_id, state)


def submit(
    spec: SpecFile,
    overrides: Overrides = None,
    key: Key = None,
    database: DatabaseUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Submit a job and print its number; `resume` works on it."""
    from cluster import jobs
    from cluster.spec import read_job

    settings = start(database)
    asked = read_job(spec, overrides or [])
    with opened(settings) as db:
        job_id = jobs.submit(db, asked, spec_folder(spec), idempotency_key=key)
    if as_json:
        print_json({"job": job_id})
    else:
        print(job_id)


def resume(
    job: JobId,
    workers: Workers = None,
    inline: Inline = False,
    ray_address: RayAddress = None,
    gpus_per_worker: GpusPerWorker = None,
    html: HtmlFile = None,
    database: DatabaseUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Go on with a job that was paused, was interrupted or failed; report. One that was cancelled stays so."""
    from db.jobs import resume_job

    settings, page = start(database, workers, ray_address, gpus_per_worker), writable(html)
    with opened(settings, create=False) as db:
        resume_job(db, job)
        state = work_on(db, job, settings, inline, database)
        print_job_report(db, job, page, as_json)
        end(db, job, state)


def pause(job: JobId, database: DatabaseUrl = None, as_json: JsonFlag = False) -> None:
    """Let no more shards of a job begin; those in hand are finished."""
    from db.jobs import pause_job

    with opened(start(database), create=False) as db:
        paused = pause_job(db, job)
        if not paused:
            _not_ended(db, job, "paused")
        _answer(db, job, "paused" if paused else "was paused already", as_json)


def retry(job: JobId, database: DatabaseUrl = None, as_json: JsonFlag = False) -> None:
    """Give the dead tasks of a job fresh attempts, for whoever works on it."""
    from db.errors import BadInput
    from db.jobs import job as read_row
    from db.jobs import retry_job

    with opened(start(database), create=False) as db:
        row = read_row(db, job)
        tasks = retry_job(db, job)
        if not tasks:
            raise BadInput(
                f"job {job} is {row.state} and has no dead task to retry; `shortstop show {job}` tells more."
            )
        _answer(db, job, f"dead tasks that are ready again: {tasks}", as_json)


def cancel(job: JobId, database: DatabaseUrl = None, as_json: JsonFlag = False) -> None:
    """End a job before its time; what is done is kept. A policy that was being added is taken back."""
    from db.jobs import cancel_job
    from db.jobs import job as read_row

    with opened(start(database), create=False) as db:
        if not cancel_job(db, job):
            _not_ended(db, job, "cancelled")
        done = read_row(db, job).state == "done"
        _answer(
            db, job, "the policy that was added is taken back, it is done as before" if done else "cancelled", as_json
        )


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
            (row.id, row.name, _state(row), row.spec["model"], moment(row.created_at), moment(row.finished_at))
            for row in rows
        ],
    )


def show(job: JobId, database: DatabaseUrl = None, as_json: JsonFlag = False) -> None:
    """One job: its state, how far it is, its spec."""
    from db.jobs import dead_tasks, progress, runs
    from db.jobs import job as read_row

    with opened(start(database), create=False) as db:
        row, state, its_runs, dead = read_row(db, job), progress(db, job), runs(db, job), dead_tasks(db, job)
    if as_json:
        print_json({"job": row, "progress": state, "runs": its_runs, "dead": dead})
        return
    shards = ", ".join(f"{count} {name}" for name, count in state.shards.items() if count)
    facts = [
        ("job", f"{row.id} {row.name}"),
        ("state", _state(row)),
        ("batches", f"{state.batches_done} of {state.batches_total}"),
        ("shards", shards or "none yet"),
        ("errors", state.errors),
        ("runs", ", ".join(f"{run.benchmark} / {run.policy}" for run in its_runs) or "none yet"),
        ("reason", row.error or state.last_error),
    ]
    print_table(("", ""), [fact for fact in facts if fact[1] is not None])
    if dead:
        print(f"\ndead, until `shortstop retry {job}` or `shortstop resume {job}`:")
        print_table(
            ("task", "batches", "attempts", "worker", "last error"),
            [(one.id, _batches(one), one.attempt, one.worker, one.error) for one in dead],
        )
        print()
    print(_yaml(row.spec), end="")


def report(job: JobId, html: HtmlFile = None, database: DatabaseUrl = None, as_json: JsonFlag = False) -> None:
    """The report of a job, finished or under way."""
    settings, page = start(database), writable(html)
    with opened(settings, create=False) as db:
        print_job_report(db, job, page, as_json)


def _not_ended(db: "Database", job_id: int, wish: str) -> None:
    """Raises `BadInput` where the job has ended."""
    from db.errors import BadInput
    from db.jobs import job as read_row

    state = read_row(db, job_id).state
    if state.ended:
        raise BadInput(f"job {job_id} is {state}; only a job that has not ended can be {wish}.")


def _answer(db: "Database", job_id: int, sentence: str, as_json: bool) -> None:
    """What became of a job: the sentence, or its row as JSON."""
    from db.jobs import job as read_row

    if as_json:
        print_json(read_row(db, job_id))
    else:
        print(f"job {job_id}: {sentence}")


def _state(row: "JobRow") -> str:
    return f"{row.state}, paused" if row.paused and not row.state.ended else row.state


def _batches(dead: "DeadTask") -> str:
    return f"{dead.first_batch} to {dead.end_batch - 1}" if dead.kind == "shard" else dead.kind


def spec_folder(spec: str) -> Path:
    """The folder that relative paths in a spec start from: the file's, or this one for standard input."""
    return Path.cwd() if spec == "-" else Path(spec).absolute().parent


def work_on(db: "Database", job_id: int, settings: "Settings", inline: bool, database: str | None) -> "JobState":
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
                gpus_per_worker=settings.gpus_per_worker,
                ray_address=settings.ray_address,
                lease_seconds=settings.lease_seconds,
                on_progress=lambda now: show_job(shown, now),
            )
    except KeyboardInterrupt:
        option = f" --database {database}" if database else ""
        note(f"job {job_id}: interrupted; go on with `shortstop resume {job_id}{option}`")
        raise typer.Exit(130) from None


def end(db: "Database", job_id: int, state: "JobState") -> None:
    """The exit code of a job that is not done, and why it is not."""
    from db.jobs import JobState, job

    if state is not JobState.DONE:
        reason = job(db, job_id).error
        note(f"shortstop: job {job_id} {state}{f': {reason}' if reason else ''}")
        raise typer.Exit(1)


def print_job_report(db: "Database", job_id: int, page: Path | None, as_json: bool) -> None:
    """The report on standard output, and the page in its file."""
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
