"""The fleet: Ray gives workers their places; who does what is decided in the database. The only module that knows Ray.

A Ray cluster is disposable. A worker that dies is replaced, its lease taken back, and nothing else remembers it.
`cluster.ray_environment.set_up_ray` is to be called before this is imported for the first time.
"""

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import structlog
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from cluster.errors import FleetError
from cluster.prepare import cores
from cluster.reaping import take_back
from db import jobs
from db.errors import BadInput
from db.session import Database, open_database
from workers.holding import patiently
from workers.worker import Pulse, Worker, finalise

log = structlog.get_logger()

#: a worker that does not answer by then will not come: its place does not exist, or its process cannot start
READY_SECONDS = 120.0
#: what a worker may take to finish the policy in hand when it is asked to stop
DRAIN_SECONDS = 30.0
#: in which Ray finds out what became of a worker that does not answer; a node is given up after 15 s
LOST_SECONDS = 25.0
#: deaths in a row, no shard finished in between, after which more of the same is no use; a shard may take four
MOST_DEATHS = 8
LONGEST_PAUSE_SECONDS = 30.0
#: nothing of ours travels through Ray's object store
OBJECT_STORE_BYTES = 80 * 2**20


class RemoteWorker:
    """A worker in a process of its own: `work` runs in one thread, control calls are answered beside it."""

    def __init__(self, url: str, name: str, timed: bool, lease_seconds: float) -> None:
        self._worker = Worker(open_database(url, create=False), name, timed=timed, lease_seconds=lease_seconds)

    @ray.method(concurrency_group="work")
    def work(self, job_id: int) -> None:
        """Work until the job has ended or the worker is drained."""
        self._worker.work(job_id)

    @ray.method(concurrency_group="control")
    def pulse(self) -> tuple[Pulse, str]:
        """What the worker is at, and the id of its node."""
        return self._worker.pulse(), ray.get_runtime_context().get_node_id()

    @ray.method(concurrency_group="control")
    def drain(self) -> None:
        """Stop soon."""
        self._worker.drain()


_Actor = ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"work": 1, "control": 2})(RemoteWorker)


@dataclass
class _Member:
    """A worker of the fleet, from its hiring to its end."""

    name: str
    actor: Any
    hired: float  #: by the monotonic clock
    ready: Any  #: reference of its first pulse
    node: str | None = None  #: known once it is ready
    working: Any = None  #: reference of `work`, once it is ready
    lost: float | None = None  #: when contact was lost; `working` then is a pulse that tells what became of it


class Fleet:
    """Keeps workers at one job. A context manager: entering starts or joins Ray, leaving ends what it started."""

    def __init__(
        self,
        db: Database,
        job_id: int,
        *,
        workers: int,
        threads: int,
        gpu: bool = False,
        ray_address: str | None = None,
        lease_seconds: float = 30,
        ready_seconds: float = READY_SECONDS,
    ) -> None:
        self.db = db
        self.job_id = job_id
        self.workers = workers
        self.threads = threads
        self.gpu = gpu
        self.ray_address = ray_address
        self.lease_seconds = lease_seconds
        self.ready_seconds = ready_seconds
        #: Ray lends GPUs and other machines' cores to one worker at a time; of our own cores we may take too many
        self.timed = gpu or ray_address is not None or workers * threads <= cores()
        self._id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._members: list[_Member] = []
        self._hired = 0
        self._deaths = 0  #: in a row, no shard finished in between
        self._done_shards = 0
        self._next_hiring = 0.0
        self._started_ray = False

    def __enter__(self) -> "Fleet":
        if not ray.is_initialized():
            self._start_ray()
        try:
            self._refuse_scattered_sqlite()
        except BaseException:
            self._leave_ray()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._dismiss()
        finally:
            self._leave_ray()

    def run(self, each_round: Callable[[], None] = lambda: None) -> None:
        """Keep workers at the job until it has ended. Raises `FleetError`.

        `KeyboardInterrupt` drains the workers, so that leases are given back, and goes on to the caller.
        """
        try:
            while not patiently(self._ended):
                self._hire()
                self._listen()
                self._check_readiness()
                patiently(self._sweep)
                each_round()
        except KeyboardInterrupt:
            self._drain()
            raise
        except RayError as error:
            raise FleetError(
                f"Ray was lost ({_reason(error)}); what is done is kept, and `shortstop resume {self.job_id}` goes on."
            ) from error

    def pulses(self) -> list[Pulse]:
        """What the workers are at that are ready; may be called from another thread than `run`'s."""
        asked = [member.actor.pulse.remote() for member in list(self._members) if member.node]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=10) if asked else ([], [])
        pulses = []
        for answer in answered:
            try:
                pulses.append(ray.get(answer)[0])
            except RayError:
                continue  # it died meanwhile
        return pulses

    # --- Ray itself

    def _start_ray(self) -> None:
        options: dict[str, Any] = {"address": self.ray_address or "local"}
        if self.ray_address is None:
            options |= {
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
                # More workers than cores still get a place each; they are not timed then.
                "num_cpus": max(cores(), 1 if self.gpu else self.workers * self.threads),
            }
        try:
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            where = f"at {self.ray_address!r}" if self.ray_address else "on this machine"
            raise FleetError(
                f"Ray {where} cannot be had ({_reason(error)}); check the address, or work inline."
            ) from None
        self._started_ray = True

    def _leave_ray(self) -> None:
        if self._started_ray:
            ray.shutdown()
            self._started_ray = False

    def _refuse_scattered_sqlite(self) -> None:
        here = socket.gethostname()
        elsewhere = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]} - {here}
        if self.db.dialect == "sqlite" and elsewhere:
            raise BadInput(
                f"database {self.db.url!r}: SQLite serves workers on one machine only, but Ray has "
                f"{', '.join(sorted(elsewhere))} beside {here}; use a PostgreSQL database."
            )

    # --- the workers

    def _hire(self) -> None:
        if time.monotonic() < self._next_hiring:
            return
        while len(self._members) < self.workers:
            name = f"{self._id}-{self._hired}"
            actor = _Actor.options(**self._place()).remote(_whole_url(self.db), name, self.timed, self.lease_seconds)
            self._members.append(_Member(name, actor, time.monotonic(), actor.pulse.remote()))
            self._hired += 1

    def _place(self) -> dict[str, int]:
        """What one worker holds. A GPU worker that also held a core could wait for ever on a node with more GPUs."""
        return {"num_gpus": 1, "num_cpus": 0} if self.gpu else {"num_cpus": self.threads}

    def _listen(self) -> None:
        awaited = {member.working or member.ready: member for member in self._members}
        answered, _ = ray.wait(list(awaited), timeout=0.5) if awaited else ([], [])
        if not awaited:
            time.sleep(0.1)  # all have died; the pause before the next hiring is not over
        for reference in answered:
            self._hear(awaited[reference], reference)

    def _hear(self, member: _Member, reference: Any) -> None:
        try:
            answer = ray.get(reference)
        except ActorUnavailableError as error:
            self._look_for(member, _reason(error))
        except RayActorError as error:
            self._bury(member, _reason(error), refund=not _is_alive(member.node))
        except Exception as error:  # raised by the worker itself
            self._bury(member, _reason(getattr(error, "cause", error)))
        else:
            if member.working is None:
                _, member.node = answer
                member.working = member.actor.work.remote(self.job_id)
            elif member.lost is not None:
                self._bury(member, "It lives, but what it was asked to do was lost on the way.", refund=True)
            else:
                self._members.remove(member)  # it saw the job's end

    def _look_for(self, member: _Member, reason: str) -> None:
        """Contact was lost: ask until Ray knows whether the process, its node or the network is to blame."""
        now = time.monotonic()
        member.lost = member.lost or now
        if now - member.lost > LOST_SECONDS:
            self._bury(member, reason)
            return
        time.sleep(0.1)
        member.working = member.actor.pulse.remote()

    def _bury(self, member: _Member, reason: str, *, refund: bool = False) -> None:
        """Take a dead worker's lease back at once, and make room for another. refund: the work is not to blame."""
        log.warning("worker died", worker=member.name, reason=reason)
        self._members.remove(member)
        ray.kill(member.actor, no_restart=True)
        take_back(self.db, self._id, gone=[member.name], refund=refund)
        self._deaths += 1
        self._next_hiring = time.monotonic() + min(0.25 * 2**self._deaths, LONGEST_PAUSE_SECONDS)
        if self._deaths >= MOST_DEATHS:
            raise FleetError(
                f"{self._deaths} workers died one after the other and no shard was finished in between; the last said: "
                f"{reason} What is done is kept, and `shortstop resume {self.job_id}` goes on."
            )

    def _sweep(self) -> None:
        """Take back what expired, under whatever fleet; see whether shards get done."""
        take_back(self.db, self._id)
        done = jobs.progress(self.db, self.job_id).shards.get("done", 0)
        if done > self._done_shards:
            self._done_shards, self._deaths = done, 0

    def _ended(self) -> bool:
        if jobs.finished(self.db, self.job_id):
            finalise(self.db, self.job_id)
        return jobs.job(self.db, self.job_id).state.ended

    def _check_readiness(self) -> None:
        late = [m for m in self._members if m.node is None and time.monotonic() - m.hired > self.ready_seconds]
        if not late:
            return
        reason = (
            f"{len(late)} of {self.workers} workers were not ready within {self.ready_seconds:.0f} s: each asks for "
            f"{'1 GPU' if self.gpu else f'{self.threads} CPU'}, and Ray has {_resources(ray.cluster_resources())}, "
            f"of which {_resources(ray.available_resources())} are free"
        )
        if len(late) == len(self._members):
            raise FleetError(f"{reason}; ask for fewer workers or threads, or add machines.")
        log.warning("the fleet stays smaller", reason=reason)
        for member in late:
            self._members.remove(member)
            ray.kill(member.actor, no_restart=True)
        self.workers -= len(late)

    def _drain(self) -> None:
        """Let every worker finish the policy in hand, commit its finished batches and give the rest back."""
        working = [member.working for member in self._members if member.working]
        for member in self._members:
            member.actor.drain.remote()
        if working:
            ray.wait(working, num_returns=len(working), timeout=DRAIN_SECONDS)

    def _dismiss(self) -> None:
        for member in self._members:
            ray.kill(member.actor, no_restart=True)
        names = [member.name for member in self._members]
        self._members.clear()
        if names:
            take_back(self.db, self._id, gone=names, refund=True)


def _is_alive(node_id: str | None) -> bool:
    return node_id is None or any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())


def _whole_url(db: Database) -> str:
    """The database's URL as another process, in another folder, needs it."""
    scheme, slashes, file = db.url.partition("sqlite:///")
    return f"{scheme}{slashes}{Path(file).absolute()}" if slashes else db.url


def _resources(amounts: dict[str, float]) -> str:
    shown = {name: amounts.get(name, 0) for name in ("CPU", "GPU")}
    return ", ".join(f"{amount:g} {name}" for name, amount in shown.items())


def _reason(error: BaseException) -> str:
    """What Ray says of a failure, without the pages around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, RayActorError):  # the last line is the reason, be it Ray's own or that of a traceback
        return lines[-1].split(" Some common causes")[0]
    return lines[0]
