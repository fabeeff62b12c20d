"""The supervisor: keeps the right workers alive for what the queue holds, and replaces those that are lost.

It decides nothing about shards: a worker that is told of a job claims them by itself, and commits them by itself.
"""

import os
import secrets
import socket
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import ClassVar

import structlog
from ray.exceptions import RayError

from cluster.errors import FleetError, RayLost
from cluster.fleet.actor import RemoteWorker
from cluster.fleet.crew import Crew, Terms, is_given_up
from cluster.fleet.demand import Duty, Group, Need, Place, Room, Shares, allocate, fits_somewhere, grouped
from cluster.fleet.members import Member
from cluster.fleet.placement import MOST_REQUESTED, Placement, reason
from cluster.prepare import cores
from cluster.reaping import take_back
from db import demand, jobs
from db.errors import BadInput
from db.records import JobState, OpenJob
from db.session import Database
from workers.holding import patiently
from workers.worker import GpuMemory, Pulse, finalise

log = structlog.get_logger()

#: between two looks at the queue: a job that is prepared waits for its first claim no longer than this and a call
LOOK_SECONDS = 0.4
#: between two looks for leases that expired, and for nodes that came or are called back
SWEEP_SECONDS = 2.0
#: a worker that is not ready by then is not waited for: its place does not exist, or its process cannot start
READY_SECONDS = 120.0
#: a worker that has its place is waited for so many times longer
SLOW_STARTS = 5
#: for how long a fleet stays as small as the places that it got, and says nothing more of it
CONTENT_SECONDS = 60.0
#: how long a worker with nothing to do stays, and keeps the model that it holds
IDLE_SECONDS = 60.0
#: work that has not moved on by a policy for so long, while its lease is renewed, hangs
STALL_SECONDS = 900.0
_BOUNDLESS = {"CPU": float("inf"), "GPU": float("inf")}


class Fleet:
    """Keeps workers at jobs. A context manager: entering starts or joins Ray, leaving ends what it started."""

    #: what Ray runs
    remote_worker: ClassVar[type[RemoteWorker]] = RemoteWorker

    def __init__(
        self,
        db: Database,
        job_ids: Collection[int] | None = None,
        *,
        workers: int | None = 1,
        workers_a_node: int = 1,
        gpus_per_worker: float = 1.0,
        ray_address: str | None = None,
        lease_seconds: float = 30,
        ready_seconds: float = READY_SECONDS,
        idle_seconds: float = IDLE_SECONDS,
        stall_seconds: float = STALL_SECONDS,
        log_level: str = "warning",
    ) -> None:
        """job_ids: the fleet's only jobs, with whose end it ends; all that ever come where it is absent.

        workers: the most that are alive at once; as many as there are places where it is absent. workers_a_node: that
        share a node's cores, where a job is prepared that does not say how many threads it wants.
        """
        self.db = db
        self.job_ids = None if job_ids is None else list(job_ids)
        self.workers = workers
        self.workers_a_node = workers_a_node
        self.gpus_per_worker = gpus_per_worker
        self.ready_seconds = ready_seconds
        self.idle_seconds = idle_seconds
        self.placement = Placement(ray_address)
        go_on = f"`shortstop resume {' '.join(map(str, self.job_ids))}` goes on" if self.job_ids else None
        self._crew = Crew(
            db,
            self.placement,
            f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}",
            self.remote_worker,
            Terms(lease_seconds, workers_a_node, stall_seconds, log_level, go_on),
        )
        self._cpus = cores()  #: that a local Ray says it has
        self._groups: list[Group] = []
        self._known: set[int] = set()  #: jobs that were open at the last look
        self._quiet: set[int] = set()  #: jobs without an open task at the last look
        self._without: dict[Need, float] = {}  #: needs that have no worker, and since when
        self._content: tuple[int, float] | None = None  #: so many workers until then: more got no place
        self._next_look = self._next_sweep = 0.0

    def __enter__(self) -> "Fleet":
        places = [group.need.place for group in grouped(self._open_jobs(), self._shares())]
        if self.job_ids is not None and self.workers is not None:  # more workers than cores still get a place each
            self._cpus = max([self._cpus, *(self.workers * place.threads for place in places)])
        self.placement.connect(self._cpus)
        try:
            self.placement.look()
            self.placement.refuse_scattered_sqlite(self.db)
            self._refuse_giants(places)
        except BaseException:
            self.placement.leave()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._crew.dismiss()
            self.placement.request([])
        except RayError as error:
            log.warning("Ray was not told", reason=reason(error))
        finally:
            self.placement.leave()

    def run(self, each_round: Callable[[], None] = lambda: None) -> None:
        """Keep workers at the jobs until they have ended, or for ever. Raises `FleetError`.

        `KeyboardInterrupt` drains the workers, so that leases are given back, and goes on to the caller.
        """
        try:
            while not self._over():
                self._round()
                each_round()
        except KeyboardInterrupt:
            self._crew.drain()
            raise
        except RayError as error:
            then = self._crew.terms.go_on or "the next fleet goes on"
            raise RayLost(f"Ray was lost ({reason(error)}); what is done is kept, and {then}.") from error

    def pulses(self) -> list[Pulse]:
        """What the workers are at that are ready; may be called from another thread than `run`'s."""
        return self._crew.pulses()

    def gpus(self) -> list[tuple[str, GpuMemory]]:
        """The GPUs that workers compute on, each behind its machine's name, as the last pulses had them."""
        pulses = ((member.host, member.pulse) for member in self._crew.members if member.pulse)
        found = {gpu.gpu: (host, gpu) for host, pulse in pulses for gpu in pulse.gpus}
        return [found[name] for name in sorted(found)]

    # --- a round

    def _round(self) -> None:
        now = time.monotonic()
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP_SECONDS
            self._look_at_nodes()
            take_back(self.db, self._crew.name, lost=self._crew.out_of_contact())
        if now >= self._next_look or self._crew.changed:
            self._next_look, self._crew.changed = now + LOOK_SECONDS, False
            self._look_at_jobs()
            self._staff()
        self._crew.ask(self._known)
        self._crew.listen(LOOK_SECONDS)
        self._check_readiness()

    def _over(self) -> bool:
        if self.job_ids is None:
            return False
        return all(patiently(partial(self._ended, job_id)) for job_id in self.job_ids)

    def _ended(self, job_id: int) -> bool:
        if jobs.finished(self.db, job_id):
            finalise(self.db, job_id)
        return jobs.job(self.db, job_id).state.ended

    def _look_at_nodes(self) -> None:
        if self.placement.look():
            self._content = None  # there may be room again
        for member in list(self._crew.members):
            if member.node in self.placement.leaving:
                self._crew.release(member, "its node is called back")

    def _open_jobs(self) -> list[OpenJob]:
        return patiently(lambda: demand.open_jobs(self.db, self.job_ids))

    def _look_at_jobs(self) -> None:
        found = self._open_jobs()
        for job_id in self._known - {job.id for job in found}:
            self._let_go(job_id)
        self._known = {job.id for job in found}
        self._finalise_what_nobody_did(found)
        self._groups = grouped(found, self._shares())

    def _let_go(self, job_id: int) -> None:
        """A job is not open any more: it was paused, it has ended, or it was cancelled, which workers are told."""
        if not is_given_up(self.db, job_id):
            return
        for member in self._crew.members:
            if job_id in member.duty.shards:
                member.actor.forget.remote(job_id)

    def _finalise_what_nobody_did(self, found: Collection[OpenJob]) -> None:
        """Whoever commits a job's last shard ends the job. Where that worker died in between, nobody did."""
        quiet = {one.id for one in found if not one.ready + one.leased and one.state is not JobState.PREPARING}
        for job_id in quiet & self._quiet:
            patiently(partial(self._ended, job_id))
        self._quiet = quiet

    def _shares(self) -> Shares:
        has_gpus = any(node.resources.get("GPU", 0) for node in self.placement.nodes)
        return Shares(self.gpus_per_worker, self.workers_a_node, has_gpus)

    # --- who is there for what

    def _staff(self) -> None:
        """Hire, move and release workers until each need has as many as it gets."""
        wanted = allocate(self._groups, self._room().take)
        self.placement.request(self._requested())
        for need in wanted:
            while self._crew.count(need) < wanted[need] and self._staff_one(need, wanted):
                pass
        self._tell_duties()
        self._release_idle(wanted)
        now = time.monotonic()
        lacking = [group.need for group in self._groups if not self._crew.count(group.need)]
        self._without = {
            need: self._without.get(need, now) for need in lacking if need.engine or not self._tended(need)
        }

    def _tended(self, need: Need) -> bool:
        """Whether somebody prepares what is to be prepared beside his other work."""
        return any(member.present and member.need.place.device == need.place.device for member in self._crew.members)

    def _room(self) -> Room:
        most = self.workers
        if self._content is not None and time.monotonic() < self._content[1]:
            most = self._content[0] if most is None else min(most, self._content[0])
        if self.workers is None or self.placement.address is None:
            return Room([node.resources for node in self.placement.nodes], most)
        return Room([_BOUNDLESS], most)  # an autoscaler may bring what lacks

    def _requested(self) -> list[Place]:
        """The places for which there is work, whatever the nodes have by now."""
        given = allocate(self._groups, Room([_BOUNDLESS], self.workers or MOST_REQUESTED).take)
        return [need.place for need, count in given.items() for _ in range(count)]

    def _staff_one(self, need: Need, wanted: dict[Need, int]) -> bool:
        """Give a need one more worker: a spare one of the same place, or a new one. False where that must wait."""
        spare = [m for m in self._crew.members if self._is_spare(m, wanted)]
        spare.sort(key=lambda member: (member.pulse is not None and member.pulse.task_id is not None, member.hired))
        unfit = self._crew.blame.unfit(need.engine)
        for member in spare:
            if member.present and member.need.place == need.place and member.node not in unfit:
                member.need, member.idle_since = need, None
                return True
        if self._has_room_for(need.place):
            return self._hire(need)
        if spare and all(member.draining is None for member in self._crew.members):
            self._crew.release(spare[0], "its place is needed")
        return False

    def _is_spare(self, member: Member, wanted: dict[Need, int]) -> bool:
        return member.draining is None and self._crew.count(member.need) > wanted.get(member.need, 0)

    def _has_room_for(self, place: Place) -> bool:
        """Beside the workers that are there."""
        room = self._room()
        return all(room.take(member.need.place) for member in self._crew.members) and room.take(place)

    def _hire(self, need: Need) -> bool:
        avoid = self._avoided(need)
        if avoid is None or self._crew.blame.waits(need):
            return False
        timed = need.place.alone and (self.placement.address is not None or self._cpus <= cores())
        self._crew.hire(need, timed=timed, avoid=avoid)
        return True

    def _avoided(self, need: Need) -> set[str] | None:
        """The nodes where a worker must not go; None where none is left, which is the end of a fleet that has one."""
        able = {node.id for node in self.placement.nodes if fits_somewhere(need.place, [node.resources])}
        unfit, blame = self._crew.blame.unfit(need.engine), self._crew.blame
        if able and able <= unfit:
            assert need.engine is not None
            if self.job_ids is not None:
                raise FleetError(f"no node can do the job: {blame.reasons[need.engine]}")
            return None
        avoided = blame.avoided(able - unfit) | self.placement.leaving
        return unfit | avoided | self.placement.out_of_reach(self.db)

    def _tell_duties(self) -> None:
        """Whatever changed for a worker since it was last told."""
        duties = {group.need: group.duty for group in self._groups}
        preparing = {
            device: tuple(job.id for group in self._groups if _prepares(group, device) for job in group.jobs)
            for device in ("cpu", "cuda")
        }
        for member in self._crew.members:
            if member.present:
                duty = Duty(duties.get(member.need, Duty()).shards, preparing[member.need.place.device])
                if duty != member.duty:
                    member.duty = duty
                    member.actor.assign.remote(duty)

    def _release_idle(self, wanted: dict[Need, int]) -> None:
        """Workers for which there has been nothing to do for a while leave."""
        now = time.monotonic()
        for member in list(self._crew.members):
            if wanted.get(member.need) or (member.duty.prepare and member.present):
                member.idle_since = None
            elif member.idle_since is None:
                member.idle_since = now
            elif now - member.idle_since > self.idle_seconds:
                self._crew.release(member, "it has had nothing to do")

    # --- places that do not come

    def _refuse_giants(self, places: Collection[Place]) -> None:
        """More than any node has will not come by waiting. Raises `BadInput`."""
        most, asked = self.placement.most("GPU"), self.gpus_per_worker
        if asked > max(most, 1) or (asked > most > 0 and any(place.device == "cuda" for place in places)):
            raise BadInput(
                f"gpus_per_worker is {asked:g}, but no node has more than {most:g} GPU; ask for fewer, or add a node "
                "that has as many."
            )

    def _check_readiness(self) -> None:
        """Say why workers do not come; raises `FleetError` where a fleet that has an end got none at all."""
        now, late = time.monotonic(), self._crew.late(self.ready_seconds)
        if late and self.placement.seem_placed([member.need.place for member in self._crew.members]):
            late = self._crew.late(SLOW_STARTS * self.ready_seconds)  # many processes that start at once take long
        without = [need for need, since in self._without.items() if now - since > self.ready_seconds]
        places = [member.need.place for member in late] or [need.place for need in without]
        if not places or (not late and self._content is not None and now < self._content[1]):
            return
        ready = len(self._crew.members) - len(late)
        why = f"{len(late) or 'no'} workers were not ready within" if late else "no worker had a place within"
        why = f"{why} {self.ready_seconds:.0f} s: {self._why_not(places[0])}"
        if self.job_ids is not None and not ready:
            raise FleetError(f"{why}; ask for fewer workers or threads, or add machines.")
        log.warning("the fleet stays smaller", ready=ready, reason=why)
        self._content = (max(ready, 1), now + CONTENT_SECONDS)
        for member in late:
            self._crew.part_with(member)

    def _why_not(self, place: Place) -> str:
        """Who has what a worker would need."""
        held = {
            job_id
            for member in self._crew.members
            if member.node is not None and member.need.place.device == place.device
            for job_id in member.duty.shards
        }
        return self.placement.why_not(place, held)


def _prepares(group: Group, device: str) -> bool:
    return group.need.engine is None and group.need.place.device == device
