"""Commands that work on whatever jobs there are, until they are told to stop."""

import os
import signal
import socket
from contextlib import ExitStack
from typing import Annotated

import typer

from cluster.cli.options import DatabaseUrl, GpusPerWorker, RayAddress
from cluster.cli.output import note
from cluster.cli.start import opened, start

FleetWorkers = Annotated[
    int | None,
    typer.Option(
        "--workers", metavar="N", min=1, help="The most that are alive at once; without it as many as there are places."
    ),
]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for another fleet on this database to end.")]
UntilIdle = Annotated[
    float | None,
    typer.Option("--until-idle", metavar="SECONDS", min=0, help="End when there was nothing to do for so long."),
]
MetricsPort = Annotated[
    int | None,
    typer.Option(
        "--metrics-port", metavar="PORT", min=0, max=65535, help="Serve Prometheus metrics at 127.0.0.1:PORT/metrics."
    ),
]


def fleet(
    workers: FleetWorkers = None,
    ray_address: RayAddress = None,
    gpus_per_worker: GpusPerWorker = None,
    wait: Wait = False,
    metrics_port: MetricsPort = None,
    database: DatabaseUrl = None,
) -> None:
    """Keep workers at all jobs, those that are still to come included, until SIGTERM or Ctrl-C."""
    from cluster.fleet.keeper import Keeper, Orders
    from cluster.schedules.ticking import ticking

    settings = start(database, None, ray_address, gpus_per_worker)
    keeper = Keeper(Orders.of(settings, workers), f"{socket.gethostname()}, process {os.getpid()}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: keeper.stop())
    with ExitStack() as stack:
        if metrics_port is not None:
            from cluster.metrics import Metrics, served

            db = stack.enter_context(opened(settings))
            port = stack.enter_context(served(Metrics(db, keeper.gpus), metrics_port))
            note(f"metrics at http://127.0.0.1:{port}/metrics")
        stack.enter_context(ticking(settings))
        keeper.run(wait=wait, on_wait=lambda holder: note(f"waiting for the fleet of {holder} to end"))


def work(until_idle: UntilIdle = None, database: DatabaseUrl = None) -> None:
    """Join the queue with one worker, without Ray, until SIGTERM or Ctrl-C."""
    from cluster.jobs import own_name
    from cluster.joining import Joined

    settings = start(database)
    with opened(settings, create=False) as db:
        joined = Joined(db, own_name(), workers=settings.workers, lease_seconds=settings.lease_seconds)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: joined.worker.drain())
        joined.work(until_idle=until_idle)
