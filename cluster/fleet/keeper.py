"""The keeper: a process that keeps a fleet over all jobs alive, whatever becomes of Ray. Knows no Ray itself.

It holds the database's place for such a fleet, starts the supervisor's process, and starts it again when that ends:
because Ray's head was lost, because it was killed, because the database was away for long.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress

import structlog
from pydantic import BaseModel

from cluster.errors import FleetError
from cluster.settings import Settings
from db.errors import BadInput, Unavailable
from db.exclusive import Exclusive
from db.session import open_database
from workers.holding import patiently
from workers.worker import GpuMemory

log = structlog.get_logger()

BAD_INPUT, LOST = 2, 75
#: what a supervisor says to its keeper, a line each
JOINED, REFUSED, GPUS = "joined", "refused: ", "gpus: "
#: between two looks at the memory of GPUs
GPU_SECONDS = 5.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 30.0
#: a supervisor that lived so long was well: the next pause is the first one again
WELL_SECONDS = 60.0
#: between two looks whether the database's place is still ours
LOOK_SECONDS = 5.0
#: for the supervisor to drain its workers and end
END_SECONDS = 60.0


class Orders(BaseModel):
    """What a fleet over all jobs is asked for, as the supervisor's process reads it."""

    database_url: str
    workers: int | None = None  #: the most that are alive at once; None: as many as there are places
    workers_a_node: int = 1
    gpus_per_worker: float = 1.0
    ray_address: str | None = None
    lease_seconds: float = 30.0
    idle_seconds: float = 60.0
    log_level: str = "warning"
    again: bool = False  #: the first one had joined: what cannot be reached now will be

    @classmethod
    def of(cls, settings: Settings, workers: int | None = None) -> "Orders":
        """As the settings say."""
        named = settings.model_dump(
            include={"database_url", "gpus_per_worker", "ray_address", "lease_seconds", "idle_seconds", "log_level"}
        )
        return cls(workers=workers, workers_a_node=settings.workers, **named)


class Keeper:
    """Keeps a fleet. `run` belongs to one thread; `stop` may be called from any, and from a signal's handler."""

    def __init__(self, orders: Orders, who: str) -> None:
        """who: what a second fleet is told."""
        self.orders = orders
        self.who = who
        self._stopping = threading.Event()
        self._supervisor: subprocess.Popen[str] | None = None
        self._joined = False
        self._refusal = ""
        self._gpus: list[tuple[str, GpuMemory]] = []

    def gpus(self) -> list[tuple[str, GpuMemory]]:
        """As `Fleet.gpus`."""
        return self._gpus

    def run(self, *, wait: bool = False, on_wait: Callable[[str], None] = lambda holder: None) -> None:
        """Keep the fleet until `stop`. wait: for another fleet on this database to end; else it is refused.

        on_wait: told, once, whom it waits for. Raises `BadInput`, `FleetError`.
        """
        with closing(open_database(self.orders.database_url)) as db:
            place = Exclusive(db, self.who)
            try:
                if self._take(place, wait, on_wait):
                    self._keep(place)
            finally:
                self._end()
                place.release()

    def stop(self) -> None:
        """Drain the workers and end."""
        self._stopping.set()

    def rest(self, seconds: float) -> bool:
        """True where `stop` was called meanwhile, or before."""
        return self._stopping.wait(seconds)

    def _take(self, place: Exclusive, wait: bool, on_wait: Callable[[str], None]) -> bool:
        """False where `stop` was called before it was this one's turn."""
        told = False
        while not patiently(place.take):
            holder = patiently(place.holder)
            if not wait:
                raise BadInput(
                    f"database {place.db.shown} has a fleet already ({holder}); end that one, or wait for its end with "
                    "--wait."
                )
            if not told:
                on_wait(holder)
                told = True
            if self._stopping.wait(1.0):
                return False
        return True

    def _keep(self, place: Exclusive) -> None:
        pause = FIRST_PAUSE_SECONDS
        while not self._stopping.is_set():
            began = time.monotonic()
            code = self._supervise(place)
            if self._stopping.is_set():
                return
            if code == BAD_INPUT:
                raise BadInput(self._refusal or "the fleet could not begin; its log says why.")
            if time.monotonic() - began > WELL_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            log.warning("supervisor ended", code=code, seconds_until_the_next=pause)
            self._stopping.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _supervise(self, place: Exclusive) -> int:
        """Start a supervisor, and stay until it has ended. Returns its exit code."""
        orders = self.orders.model_copy(update={"again": self._joined}).model_dump_json()
        # a session of its own: a terminal's Ctrl-C goes to the keeper, which asks it to drain
        self._supervisor = subprocess.Popen(
            [sys.executable, "-m", "cluster.fleet.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._supervisor.stdin is not None
        assert self._supervisor.stdout is not None
        with suppress(BrokenPipeError), self._supervisor.stdin as told:
            told.write(orders)  # not an argument: everybody on the machine would see the database's password
        listening = threading.Thread(target=self._listen, args=(self._supervisor.stdout,), daemon=True)
        listening.start()
        next_look = time.monotonic() + LOOK_SECONDS
        while self._supervisor.poll() is None and not self._stopping.wait(0.1):
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + LOOK_SECONDS
                self._check(place)
        if self._stopping.is_set():
            self._end()
        code = self._supervisor.wait()
        listening.join(1.0)
        self._supervisor.stdout.close()
        return code

    def _check(self, place: Exclusive) -> None:
        """Raises `FleetError` where another fleet has the place by now."""
        try:
            kept = place.kept()
        except Unavailable:
            return  # the lock went with the connection, and so did everybody else's
        if not kept:
            raise FleetError(
                f"the connection to database {place.db.shown} was lost, and another fleet has taken over "
                f"({patiently(place.holder)}); this one ends."
            )

    def _listen(self, said: Iterable[str]) -> None:
        for line in said:
            if line.rstrip("\n") == JOINED:
                self._joined = True
            elif line.startswith(REFUSED):
                self._refusal = line.removeprefix(REFUSED).rstrip("\n")
            elif line.startswith(GPUS):
                self._gpus = [(host, GpuMemory(*one)) for host, one in json.loads(line.removeprefix(GPUS))]
        self._gpus = []  # what its workers had

    def _end(self) -> None:
        if self._supervisor is None or self._supervisor.poll() is not None:
            return
        self._supervisor.terminate()
        try:
            self._supervisor.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            self._supervisor.wait()
