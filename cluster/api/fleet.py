"""The server's fleet: a process beside the server that works on its jobs, one after the other, until the server ends.

The one place where `shortstop serve` gets workers from.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import structlog

from cluster.errors import ClusterError
from cluster.jobs import work
from cluster.logs import configure_logs
from cluster.settings import Settings
from db.errors import RecordError
from db.listing import summaries
from db.records import JobState, Progress
from db.session import Database, open_database
from engine.errors import EngineError

log = structlog.get_logger()

#: between two looks for work where there is none, or after a job that could not be worked on
LOOK_SECONDS = 1.0
#: for workers to finish what is in hand
END_SECONDS = 60.0
_OPEN = [state for state in JobState if not state.ended]


@contextmanager
def fleet(settings: Settings) -> Iterator[None]:
    """Workers for every job of the record, for as long as the context lasts."""
    # a session of its own: a terminal's Ctrl-C goes to the server, which ends it
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.api.fleet"], stdin=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin is not None
    with process.stdin as orders:  # not an argument, which everybody on the machine sees
        orders.write(settings.model_dump_json().encode())
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> None:
    """Work as the settings on standard input say, until the server that began this is gone."""
    settings = Settings.model_validate_json(sys.stdin.read())
    configure_logs(settings.log_level)
    server = os.getppid()

    def check_server(progress: Progress | None = None) -> None:
        if os.getppid() != server:
            raise KeyboardInterrupt

    with closing(open_database(settings.database_url)) as db:
        while True:
            check_server()
            if not _work_on_next(db, settings, check_server):
                time.sleep(LOOK_SECONDS)


def _work_on_next(db: Database, settings: Settings, check_server: Callable[[Progress], None]) -> bool:
    """False where there was nothing to do, or it could not be done."""
    try:
        waiting = [row for row in summaries(db, states=_OPEN) if not row.paused]
        if not waiting:
            return False
        first = min(waiting, key=lambda row: (-row.priority, row.id))
        work(db, first.id, workers=settings.workers, lease_seconds=settings.lease_seconds, on_progress=check_server)
    except (EngineError, RecordError, ClusterError) as error:
        log.warning("a job could not be worked on", reason=str(error))
        return False
    return True


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(0)
