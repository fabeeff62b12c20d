"""Services at work: started when what they wait for is there, watched, started again, and ended in order."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO

import psutil

from cluster.compose.file import Condition
from cluster.compose.host import MARK, Host, Process
from cluster.errors import ClusterError

_ROUND_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 60.0


class ServiceFailed(ClusterError):
    """A service that others wait for ended or is not well; all were ended."""


class Running:
    """One service, from its start to its end."""

    def __init__(self, process: Process, width: int) -> None:
        self.process = process
        self.name = process.service.name
        self.code: int | None = None  #: of the last end
        self.healthy = False
        self._width = width
        self._main: subprocess.Popen[str] | None = None
        self._look: subprocess.Popen[bytes] | None = None  #: the health check that runs now
        self._looked_at = 0.0
        self._started_at = 0.0
        self._misses = 0
        self._starts = 0
        self._next_start = 0.0

    @property
    def started(self) -> bool:
        return self._main is not None

    @property
    def completed(self) -> bool:
        return self.code == 0 and not self.process.service.restarts

    def fulfils(self, condition: Condition) -> bool:
        """Whether who waits for this may begin."""
        if condition is Condition.COMPLETED:
            return self.completed
        return self.started and (condition is Condition.STARTED or self.healthy)

    def start(self) -> None:
        self.process.prepare()
        self._main = subprocess.Popen(
            self.process.command,
            env=self.process.environment,
            cwd="/" if self.process.user else self.process.folder,
            user=self.process.user,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for us to pass on, in order
        )
        assert self._main.stdout is not None
        threading.Thread(target=self._pass_on, args=(self._main.stdout,), daemon=True).start()
        self.code, self._started_at, self._misses = None, time.monotonic(), 0
        self._starts += 1

    def look_after(self) -> None:
        """See whether it lives and is well; start it again where it shall be. Raises `ServiceFailed`."""
        if self._main is None:
            if self.process.service.restarts and self.code is not None and time.monotonic() >= self._next_start:
                self.start()
            return
        self.code = self._main.poll()
        if self.code is None:
            self._check_health()
            return
        self._forget()
        if self.process.service.restarts:
            if time.monotonic() - self._started_at > _LONGEST_PAUSE_SECONDS:  # it was well
                self._starts = 1
            pause = min(0.5 * 2 ** min(self._starts, 10), _LONGEST_PAUSE_SECONDS)
            self._next_start = time.monotonic() + pause
            say(f"{self.name} ended with code {self.code}; it is started again in {pause:.0f} s")
        elif self.code:
            raise ServiceFailed(f"service {self.name} ended with code {self.code}; what it said stands above.")

    def _check_health(self) -> None:
        health, now = self.process.service.health, time.monotonic()
        if health is None:
            return
        if self._look is None:
            # until it is well for the first time others wait: look more often
            if now - self._looked_at >= (health.interval if self.healthy else min(health.interval, 1)):
                self._looked_at = now
                self._look = subprocess.Popen(
                    self.process.health,
                    env=self.process.environment,
                    user=self.process.user,
                    cwd="/",
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            return
        if self._look.poll() is None and now - self._looked_at < health.timeout:
            return
        well = self._look.poll() == 0
        self._end_look()
        self._misses = 0 if well or now - self._started_at < health.start_period else self._misses + 1
        if well and not self.healthy:
            say(f"{self.name} is well")
        self.healthy = well or (self.healthy and self._misses < health.retries)
        if self._misses >= health.retries:
            raise ServiceFailed(f"service {self.name} is not well; what it said stands above.")

    def stop(self, *, at_once: bool = False) -> None:
        """End it as a container is ended: the first process is asked, and with it everything goes."""
        if self._main is not None:
            if not at_once:
                self._main.send_signal(signal.Signals[self.process.service.stop_signal])
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._main.wait(self.process.service.grace_seconds)
            self._main.kill()
            self._main.wait()
        self._forget()

    def _forget(self) -> None:
        self._end_look()
        end_all(lambda mark: mark == self.process.environment[MARK])
        self._main, self.healthy = None, False

    def _end_look(self) -> None:
        if self._look is not None:
            self._look.kill()
            self._look.wait()
            self._look = None

    def _pass_on(self, lines: IO[str]) -> None:
        for line in lines:
            print(f"{self.name:<{self._width}} | {line}", end="", flush=True)


class Project:
    """A project's services. A context manager: leaving it ends them, last started first."""

    def __init__(self, host: Host, processes: dict[str, Process]) -> None:
        self.host = host
        width = max(map(len, processes))
        self.running = {name: Running(process, width) for name, process in processes.items()}

    def __enter__(self) -> "Project":
        end_all(self.host.owns)  # what an `up` left that was killed
        return self

    def __exit__(self, *_: object) -> None:
        at_once = False
        for one in reversed(self.running.values()):
            if not one.started:
                continue
            say(f"{one.name} is being ended")
            try:
                one.stop(at_once=at_once)
            except KeyboardInterrupt:  # somebody has no patience
                at_once = True
                one.stop(at_once=True)

    def watch(self) -> Iterator[None]:
        """Look after everything once a step. Raises `ServiceFailed`."""
        while True:
            for one in self.running.values():
                if not one.started and one.code is None and self._may_start(one):
                    say(f"{one.name} starts at {one.process.inside.address}")
                    one.start()
                one.look_after()
            yield
            time.sleep(_ROUND_SECONDS)

    def _may_start(self, one: Running) -> bool:
        waits_for = one.process.service.depends_on.items()
        return all(self.running[other].fulfils(condition) for other, condition in waits_for)

    @property
    def up(self) -> bool:
        """Whether all that was asked for is there: started and well, or done."""
        return all(
            one.completed or one.fulfils(Condition.HEALTHY if one.process.service.health else Condition.STARTED)
            for one in self.running.values()
        )


def end_all(doom: Callable[[str], bool]) -> None:
    """Kill every process whose environment carries such a mark."""
    doomed = [process for process in psutil.process_iter() if doom(_mark(process))]
    for process in doomed:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(doomed, timeout=10)


def _mark(process: psutil.Process) -> str:
    try:
        return str(process.environ().get(MARK, ""))
    except (psutil.Error, OSError):
        return ""


def say(line: str) -> None:
    """A line about the services, beside what they say themselves."""
    print(line, file=sys.stderr, flush=True)
