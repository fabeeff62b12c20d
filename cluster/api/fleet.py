"""The server's fleet: workers for every job of the record, until the server ends.

The one place where `shortstop serve` gets workers from.
"""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from cluster.errors import ClusterError
from cluster.fleet.keeper import Keeper, Orders
from cluster.settings import Settings
from db.errors import RecordError
from engine.errors import EngineError

log = structlog.get_logger()


#: before a fleet that could not begin, or had to end, is tried again
AGAIN_SECONDS = 30.0


@contextmanager
def fleet(settings: Settings, workers: int | None = None) -> Iterator[Keeper]:
    """Keep workers for as long as the context lasts. Where the database has a fleet already, that one works.

    workers: the most that are alive at once; as many as there are places where it is absent.
    """
    keeper = Keeper(Orders.of(settings, workers), f"the server on {socket.gethostname()}, process {os.getpid()}")
    thread = threading.Thread(target=_keep, args=(keeper,), name="fleet")
    thread.start()
    try:
        yield keeper
    finally:
        keeper.stop()
        thread.join()


def _keep(keeper: Keeper) -> None:
    while not keeper.rest(0):
        try:
            keeper.run(
                wait=True, on_wait=lambda holder: log.info("another fleet works on this database", holder=holder)
            )
        except (EngineError, RecordError, ClusterError) as error:  # it answers nonetheless; Ray may come later
            log.error("the server has no workers", reason=str(error), next_try_seconds=AGAIN_SECONDS)
            keeper.rest(AGAIN_SECONDS)
