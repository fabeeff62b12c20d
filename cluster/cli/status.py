"""`shortstop status` and `shortstop logs`: how far the work is and what happened, once or for as long as one looks."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.options import DatabaseUrl, JobId, JsonFlag, ServerUrl
from cluster.cli.output import to_json
from cluster.cli.start import service
from engine.errors import BadInput

if TYPE_CHECKING:
    from rich.console import Group

    from cluster.status import JobStatus, Status, WorkerStatus
    from db.events import Event

Job = Annotated[int | None, typer.Argument(metavar="[JOB]", min=1, max=2**31 - 1, help="One job; all open if absent.")]
Watch = Annotated[bool, typer.Option("--watch", help="Look again and again, until JOB has ended or Ctrl-C.")]
Every = Annotated[
    float | None,
    typer.Option("--every", metavar="SECONDS", help="Between two looks: 2 on a terminal, 10 elsewhere if absent."),
]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="And what happens, until the job has ended or Ctrl-C.")]
Look = Callable[["Status"], None]


def status(
    job: Job = None,
    watch: Watch = False,
    every: Every = None,
    database: DatabaseUrl = None,
    server: ServerUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Jobs, workers, nodes, throughput and time left."""
    pause = every if every is not None else 2.0 if sys.stdout.isatty() else 10.0
    if not 0.1 <= pause <= 3600:
        raise BadInput(f"--every {pause:g} is not between 0.1 and 3600 seconds; give one that is.")
    with service(database, server=server) as shortstop:
        now = shortstop.status(job)  # what is wrong is told before there is a table
        try:
            with _shown(watch, as_json) as show:
                while True:
                    show(now)
                    if not watch or (job is not None and now.jobs[0].ended):
                        return
                    time.sleep(pause)
                    now = shortstop.status(job)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def logs(
    job: JobId,
    follow: Follow = False,
    database: DatabaseUrl = None,
    server: ServerUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """What happened to a job: when, who did it, what it was; a line each."""
    with service(database, server=server) as shortstop:
        try:
            for event in shortstop.events(job, follow=follow):
                print(to_json(asdict(event)) if as_json else _event_line(event), flush=True)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def _event_line(event: "Event") -> str:
    from cluster.reports.formats import printable

    at = datetime.fromtimestamp(event.at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    detail = " ".join(f"{name}={value}" for name, value in event.detail.items())
    return printable(f"{at}  {event.what}  {event.who}  {detail}".rstrip())


@contextmanager
def _shown(watch: bool, as_json: bool) -> Iterator[Look]:
    """How a look is shown: a JSON document each, tables that stay in place on a terminal, plain lines elsewhere."""
    if as_json:
        yield lambda now: print(to_json(asdict(now), indent=None if watch else 2), flush=True)
    elif sys.stdout.isatty():
        from rich.live import Live

        with Live(auto_refresh=False) as live:
            yield lambda now: live.update(_tables(now), refresh=True)
    else:
        yield _lines()


def _lines() -> Look:
    """A line a job and one of all workers; those that say what they said before are left out."""
    said: set[str] = set()

    def show(now: "Status") -> None:
        nonlocal said
        lines = [_line(one) for one in now.jobs] + [_workers_line(now)]
        for line in lines:
            if line not in said:
                print(line, flush=True)
        said = set(lines)

    return show


def _line(job: "JobStatus") -> str:
    parts = [_state(job)]
    if job.batches_total:
        parts.append(f"{job.batches_done} of {job.batches_total} batches")
    if job.errors:
        parts.append(f"{job.errors} errors")
    if job.workers:
        parts.append(_number(job.workers, "worker"))
    parts += [part for part in (_speed(job.tokens_per_second), _left(job)) if part]
    return f"job {job.job} {job.name}: {', '.join(parts)}"


def _workers_line(now: "Status") -> str:
    if not now.workers:
        return "no worker is at work"
    nodes = ", ".join(f"{count} on {node}" for node, count in sorted(now.nodes.items()))
    silent = sum(one.state == "silent" for one in now.workers)
    return f"{_number(len(now.workers), 'worker')}: {nodes}{f'; {silent} silent' if silent else ''}"


def _tables(now: "Status") -> "Group":
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    of_jobs = Table("job", "name", "state", "batches", "workers", "tokens/s", "left", box=None, header_style="bold")
    for job in now.jobs:
        batches = f"{job.batches_done} of {job.batches_total}" if job.batches_total else ""
        speed = "" if job.tokens_per_second is None else f"{job.tokens_per_second:,.0f}"
        row = (str(job.job), job.name, _state(job), batches, str(job.workers), speed, _left(job).removesuffix(" left"))
        of_jobs.add_row(*map(Text, row))
    of_workers = Table("worker", "node", "state", "job", "shard", "batches", "attempt", box=None, header_style="bold")
    for one in now.workers:
        of_workers.add_row(*map(Text, _worker(one)))
    return Group(of_jobs if now.jobs else "no job is open", "", of_workers, _workers_line(now))


def _worker(one: "WorkerStatus") -> tuple[str, ...]:
    at = ("", "", "", "")
    if one.job is not None:
        batches = f"{one.batches_done} of {one.batches}" if one.shard else ""
        at = (str(one.job), str(one.shard or ""), batches, str(one.attempt))
    return (one.worker, one.node, one.state, *at)


def _state(job: "JobStatus") -> str:
    return f"{job.state}, paused" if job.paused else job.state


def _speed(tokens_per_second: float | None) -> str:
    return "" if tokens_per_second is None else f"{tokens_per_second:,.0f} tokens/s"


def _left(job: "JobStatus") -> str:
    from cluster.reports.formats import duration

    return "" if job.seconds_left is None else f"{duration(job.seconds_left)} left"


def _number(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
