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
    ServerUrl,
    SpecFile,
    Workers,
)
from cluster.cli.output import note, print_json, print_table
from cluster.cli.start import service, writable
from engine.errors import BadInput

if TYPE_CHECKING:
    from cluster.prepare import Validation
    from cluster.service import Service
    from db.listing import JobSummary
    from db.records import DeadTask, JobRow, JobState


def run(
    spec: SpecFile,
    overrides: Overrides = None,
    workers: Workers = None,
    inline: Inline = False,
    ray_address: RayAddress = None,
    gpus_per_worker: GpusPerWorker = None,
    html: HtmlFile = None,
    database: DatabaseUrl = None,
    server: ServerUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Submit a job, work on it, report."""
    from cluster.spec import read_job

    page = writable(html)
    with service(database, workers, server, ray_address, gpus_per_worker, inline=inline) as shortstop:
        asked, folder = read_job(spec, overrides or []), spec_folder(spec)
        shortstop.validate(asked, folder)  # before there is a job, or a database
        job_id = shortstop.submit(asked, folder)
        note(f"job {job_id}: submitted")
        see_through(shortstop, job_id, inline, database, server, page, as_json)


def submit(
    spec: SpecFile,
    overrides: Overrides = None,
    key: Key = None,
    database: DatabaseUrl = None,
    server: ServerUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Submit a job and print its number; `resume` works on it."""
    from cluster.spec import read_job

    with service(database, server=server) as shortstop:
        job_id = shortstop.submit(read_job(spec, overrides or []), spec_folder(spec), key=key)
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
    server: ServerUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Go on with a job that was paused, was interrupted or failed; report. One that was cancelled stays so."""
    page = writable(html)
    with service(database, workers, server, ray_address, gpus_per_worker, inline=inline) as shortstop:
        shortstop.resume(job)
        see_through(shortstop, job, inline, database, server, page, as_json)


def pause(job: JobId, database: DatabaseUrl = None, server: ServerUrl = None, as_json: JsonFlag = False) -> None:
    """Let no more shards of a job begin; those in hand are finished."""
    with service(database, server=server) as shortstop:
        was_paused = shortstop.job(job).job.paused
        _answer(shortstop.pause(job), "was paused already" if was_paused else "paused", as_json)


def retry(job: JobId, database: DatabaseUrl = None, server: ServerUrl = None, as_json: JsonFlag = False) -> None:
    """Give the dead tasks of a job fresh attempts, for whoever works on it."""
    with service(database, server=server) as shortstop:
        done = shortstop.retry(job)
    _answer(done.job, f"dead tasks that are ready again: {done.tasks}", as_json)


def cancel(job: JobId, database: DatabaseUrl = None, server: ServerUrl = None, as_json: JsonFlag = False) -> None:
    """End a job before its time; what is done is kept. A policy that was being added is taken back."""
    with service(database, server=server) as shortstop:
        row = shortstop.cancel(job)
        taken_back = "the policy that was added is taken back, it is done as before"
        _answer(row, taken_back if row.state == "done" else "cancelled", as_json)


def validate(
    spec: SpecFile,
    overrides: Overrides = None,
    database: DatabaseUrl = None,
    server: ServerUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Check a spec and say what its job would do, and how long that would take."""
    from cluster.spec import read_job

    with service(database, server=server) as shortstop:
        asked = read_job(spec, overrides or [])
        found = shortstop.validate(asked, spec_folder(spec))
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
    print(f"\n{_estimate(found)}")


def _estimate(found: "Validation") -> str:
    from cluster.reports.formats import duration

    if found.estimate is None:
        return "how long it takes is not known: the model has not been timed on this device class"
    earlier = "1 earlier job" if found.estimate.jobs == 1 else f"{found.estimate.jobs} earlier jobs"
    return f"about {duration(found.estimate.seconds)} of work, going by {earlier}; workers share it"


def list_jobs(database: DatabaseUrl = None, server: ServerUrl = None, as_json: JsonFlag = False) -> None:
    """The jobs in the database, newest first."""
    from cluster.reports.formats import moment

    with service(database, server=server) as shortstop:
        rows = shortstop.jobs()
    if as_json:
        print_json(rows)
        return
    columns = ("job", "name", "state", "model", "created", "finished")
    print_table(
        columns,
        [(row.id, row.name, _state(row), row.model, moment(row.created_at), moment(row.finished_at)) for row in rows],
    )


def show(job: JobId, database: DatabaseUrl = None, server: ServerUrl = None, as_json: JsonFlag = False) -> None:
    """One job: its state, how far it is, its spec."""
    with service(database, server=server) as shortstop:
        found = shortstop.job(job)
    if as_json:
        print_json(found)
        return
    row, state, dead = found.job, found.progress, found.dead
    shards = ", ".join(f"{count} {name}" for name, count in state.shards.items() if count)
    facts = [
        ("job", f"{row.id} {row.name}"),
        ("state", _state(row)),
        ("batches", f"{state.batches_done} of {state.batches_total}"),
        ("shards", shards or "none yet"),
        ("errors", state.errors),
        ("runs", ", ".join(f"{run.benchmark} / {run.policy}" for run in found.runs) or "none yet"),
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


def report(
    job: JobId,
    html: HtmlFile = None,
    database: DatabaseUrl = None,
    server: ServerUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """The report of a job, finished or under way."""
    page = writable(html)
    with service(database, server=server) as shortstop:
        check_reported(shortstop.job(job).job)
        print_job_report(shortstop, job, page, as_json)


def check_reported(row: "JobRow") -> None:
    """Whether a job has completions to report. Raises `BadInput`."""
    if row.spec.get("trace") is not None:
        raise BadInput(f"job {row.id} is a trace, which ran no policy; ask it with `shortstop replay {row.id}`.")


def _answer(row: "JobRow", sentence: str, as_json: bool) -> None:
    """What became of a job: the sentence, or its row as JSON."""
    if as_json:
        print_json(row)
    else:
        print(f"job {row.id}: {sentence}")


def _state(row: "JobRow | JobSummary") -> str:
    return f"{row.state}, paused" if row.paused and not row.state.ended else row.state


def _batches(dead: "DeadTask") -> str:
    return f"{dead.first_batch} to {dead.end_batch - 1}" if dead.kind == "shard" else dead.kind


def spec_folder(spec: str) -> Path:
    """The folder that relative paths in a spec start from: the file's, or this one for standard input."""
    return Path.cwd() if spec == "-" else Path(spec).absolute().parent


def see_through(
    shortstop: "Service",
    job_id: int,
    inline: bool,
    database: str | None,
    server: str | None,
    page: Path | None,
    as_json: bool,
) -> None:
    """Work until the job has ended, report, and end as it did. Ctrl-C ends the command with the one that goes on."""
    from cluster.cli.progress import show_job, watch

    try:
        with watch() as shown:
            state = shortstop.work(job_id, inline=inline, on_progress=lambda now: show_job(shown, now))
    except KeyboardInterrupt:
        option = f" --database {database}" if database else f" --server {server}" if server else ""
        note(f"job {job_id}: interrupted; go on with `shortstop resume {job_id}{option}`")
        raise typer.Exit(130) from None
    if shortstop.job(job_id).job.spec.get("trace") is None:
        print_job_report(shortstop, job_id, page, as_json)
    elif as_json:
        print_json(shortstop.job(job_id).job)
    else:
        print(f"job {job_id}: traced; ask it with `shortstop replay {job_id}`")
    _end(shortstop, job_id, state)


def _end(shortstop: "Service", job_id: int, state: "JobState") -> None:
    """The exit code of a job that is not done, and why it is not."""
    from db.records import JobState

    if state is not JobState.DONE:
        reason = shortstop.job(job_id).job.error
        note(f"shortstop: job {job_id} {state}{f': {reason}' if reason else ''}")
        raise typer.Exit(1)


def print_job_report(shortstop: "Service", job_id: int, page: Path | None, as_json: bool) -> None:
    """The report on standard output, and the page in its file."""
    found = shortstop.report(job_id, with_tokens=page is not None or as_json)
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
