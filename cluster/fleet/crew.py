"""The crew: the fleet's workers, from their hiring to their end, and what they say in between."""

import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import structlog
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from cluster.errors import FleetError
from cluster.fleet.actor import RemoteWorker, as_actor
from cluster.fleet.demand import Need
from cluster.fleet.members import Blame, Member
from cluster.fleet.placement import Placement, reason, wait
from cluster.reaping import take_back
from db import jobs
from db.errors import BadInput
from db.records import JobState
from db.session import Database
from workers.holding import patiently
from workers.worker import Pulse, Unfit

log = structlog.get_logger()

#: between two questions of how a worker is getting on
PULSE_SECONDS = 5.0
#: the same where the worker is at a job that is over
IMPATIENT_SECONDS = 0.4
#: a worker that answers nothing for so long is frozen, or its node is
SILENT_SECONDS = 60.0
#: what a worker may take to let go of a job that was cancelled
FREE_SECONDS = 5.0
#: what a worker may take to finish the policy in hand when it is asked to stop
DRAIN_SECONDS = 30.0
#: in which Ray finds out what became of a worker that does not answer; a node is given up after 15 s
LOST_SECONDS = 25.0
#: deaths in a row, no shard finished in between, after which more of the same is no use; a shard may take four
MOST_DEATHS = 8


@dataclass(frozen=True)
class Terms:
    """On what terms workers are hired."""

    lease_seconds: float
    workers_a_node: int
    stall_seconds: float  #: work that has not moved on by a policy for so long, while its lease is renewed, hangs
    log_level: str
    #: what to tell where workers keep dying; None: there is nobody who would hear it, go on
    go_on: str | None


class Crew:
    """The workers of one fleet."""

    def __init__(self, db: Database, placement: Placement, name: str, of: type[RemoteWorker], terms: Terms) -> None:
        """name: how the names of all its workers begin. of: what Ray runs."""
        self.db = db
        self.placement = placement
        self.name = name
        self.terms = terms
        self.members: list[Member] = []
        self.blame = Blame()
        self.changed = False  #: somebody came or went since it was last set to False
        self._open: Collection[int] = ()  #: the open jobs, as it was last told
        self._actor = as_actor(of)
        self._hired = 0

    # --- coming and going

    def hire(self, need: Need, *, timed: bool, avoid: Collection[str]) -> None:
        """avoid: ids of nodes where it must not go."""
        name = f"{self.name}-{self._hired}"
        gpu = need.place.device == "cuda"
        # a GPU worker that also held a core could wait for ever on a node with more GPUs
        options: dict[str, Any] = {"num_gpus": need.place.gpus if gpu else 0}
        options |= {"num_cpus": 0 if gpu else need.place.threads}
        if avoid:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"}
        terms = self.terms
        actor = self._actor.options(**options).remote(
            _whole_url(self.db), name, timed, terms.lease_seconds, terms.workers_a_node, terms.log_level
        )
        self.members.append(Member(name, actor, need, time.monotonic(), actor.pulse.remote()))
        self._hired += 1

    def count(self, need: Need) -> int:
        return sum(member.need == need and member.draining is None for member in self.members)

    def out_of_contact(self) -> list[str]:
        """Names of those that cannot be reached, or whose node is gone."""
        alive = {node.id for node in self.placement.nodes}
        return [m.name for m in self.members if m.lost is not None or (m.node is not None and m.node not in alive)]

    def late(self, seconds: float) -> list[Member]:
        """Those that were hired longer ago and are not ready."""
        now = time.monotonic()
        return [member for member in self.members if member.node is None and now - member.hired > seconds]

    def release(self, member: Member, why: str) -> None:
        """Let a worker stop soon; one that is not ready yet at once."""
        if member.draining is not None:
            return
        log.info("worker released", worker=member.name, reason=why)
        if member.node is None:
            self.part_with(member)
            return
        member.draining = time.monotonic()
        member.actor.drain.remote()

    def part_with(self, member: Member) -> None:
        self.members.remove(member)
        ray.kill(member.actor, no_restart=True)
        self.changed = True

    def drain(self) -> None:
        """Let every worker finish the policy in hand, commit its finished batches and give the rest back."""
        working = [member.working for member in self.members if member.working]
        for member in self.members:
            member.actor.drain.remote()
        if working:
            ray.wait(working, num_returns=len(working), timeout=DRAIN_SECONDS)

    def dismiss(self) -> None:
        """End all of them, now."""
        names = [member.name for member in self.members]
        try:
            for member in self.members:
                ray.kill(member.actor, no_restart=True)
        except RayError as error:  # it is gone, and they with it
            log.warning("workers could not be dismissed", reason=reason(error))
        self.members.clear()
        if names:
            take_back(self.db, self.name, gone=names, refund=True)

    # --- what they say

    def pulses(self) -> list[Pulse]:
        """What the workers are at that are ready; may be called from any thread."""
        asked = [member.actor.pulse.remote() for member in list(self.members) if member.node]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=10) if asked else ([], [])
        pulses = []
        for answer in answered:
            try:
                pulses.append(ray.get(answer)[0])
            except RayError:
                continue  # it died meanwhile
        return pulses

    def listen(self, seconds: float) -> None:
        """Hear what workers say within this time."""
        awaited = {member.working or member.ready: partial(self._hear, member) for member in self.members}
        awaited |= {m.asked: partial(self._hear_pulse, m) for m in self.members if m.asked is not None}
        whose = {reference: hear.args[0] for reference, hear in awaited.items()}
        for reference in wait(list(awaited), seconds):
            if whose[reference] in self.members:
                awaited[reference](reference)

    def ask(self, open_jobs: Collection[int]) -> None:
        """See that workers tell how they are getting on, and replace those that do not."""
        now, self._open = time.monotonic(), open_jobs
        for member in list(self.members):
            if member.node is None:
                continue
            is_over = member.pulse is not None and member.pulse.job_id not in (None, *open_jobs)
            every = IMPATIENT_SECONDS if is_over else min(PULSE_SECONDS, self.terms.stall_seconds / 3)
            if member.draining is not None and now - member.draining > DRAIN_SECONDS:
                self._bury(member, "It did not stop when it was asked to.", refund=True)
            elif member.asked is not None and now - member.asked_at > max(SILENT_SECONDS, self.terms.lease_seconds):
                self._bury(member, "It answers nothing any more.")
            elif member.asked is None and now - member.asked_at > every:
                member.asked, member.asked_at = member.actor.pulse.remote(), now

    def _hear(self, member: Member, reference: Any) -> None:
        try:
            answer = ray.get(reference)
        except ActorUnavailableError as error:
            self._look_for(member, reason(error))
        except RayActorError as error:
            self._bury(member, reason(error), refund=not self.placement.is_alive(member.node))
        except Exception as error:  # raised by the worker itself
            cause = getattr(error, "cause", error)
            if isinstance(cause, Unfit):
                self._dismiss_unfit(member, str(cause))
            else:
                self._bury(member, reason(cause))
        else:
            if member.working is None:
                self._welcome(member, *answer)
            elif member.lost is not None:
                self._bury(member, "It lives, but what it was asked to do was lost on the way.", refund=True)
            else:
                self.part_with(member)  # it was drained

    def _welcome(self, member: Member, pulse: Pulse, node: str) -> None:
        """The worker is ready."""
        member.name, member.node = pulse.name, node
        member.working = member.actor.serve.remote()
        self.changed = True

    def _hear_pulse(self, member: Member, reference: Any) -> None:
        member.asked = None
        try:
            pulse: Pulse = ray.get(reference)[0]
        except RayError:
            return  # `working` tells what became of it
        if pulse.done > (member.pulse.done if member.pulse else 0):
            self.blame.worked(member)
        member.pulse = pulse
        if pulse.still_seconds > self.terms.stall_seconds:
            still = f"{pulse.still_seconds:.0f} s"
            self._bury(
                member, f"Task {pulse.task_id} hangs: it has not moved on for {still}, but its lease is renewed."
            )
        elif pulse.job_id is None or pulse.job_id in self._open or not is_given_up(self.db, pulse.job_id):
            member.cancelled_since = None
        else:
            member.cancelled_since = member.cancelled_since or time.monotonic()
            if time.monotonic() - member.cancelled_since > FREE_SECONDS:
                self._bury(member, f"It did not let go of job {pulse.job_id}, which is over.", refund=True)

    def _look_for(self, member: Member, why: str) -> None:
        """Contact was lost: ask until Ray knows whether the process, its node or the network is to blame."""
        now = time.monotonic()
        member.lost = member.lost or now
        if now - member.lost > LOST_SECONDS:
            self._bury(member, why)
            return
        time.sleep(0.1)
        member.working = member.actor.pulse.remote()

    def _bury(self, member: Member, why: str, *, refund: bool = False) -> None:
        """Take a dead worker's lease back at once, and make room for another. refund: the work is not to blame."""
        node = self.placement.named(member.node)
        log.warning("worker died", worker=member.name, node=node, reason=why)
        self.part_with(member)
        take_back(self.db, self.name, gone=[member.name], refund=refund)
        if refund:
            return
        if self.blame.died(member):
            log.warning("node avoided", node=node, reason=f"workers keep dying there, the last one so: {why}")
        deaths = self.blame.deaths(member.need)
        if self.terms.go_on is not None and deaths >= MOST_DEATHS:
            raise FleetError(
                f"{deaths} workers died one after the other and no shard was finished in between; the last, on {node}, "
                f"said: {why} What is done is kept, and {self.terms.go_on}."
            )

    def _dismiss_unfit(self, member: Member, why: str) -> None:
        """The worker gave its shard back: its machine cannot do what the job pins."""
        node = self.placement.named(member.node)
        log.warning("node cannot do the job", node=node, reason=why)
        self.part_with(member)
        self.blame.refused(member, f"{why} (On {node}.)")


def is_given_up(db: Database, job_id: int) -> bool:
    """Whether what is in hand of the job is for nobody."""
    try:
        return patiently(lambda: jobs.job(db, job_id)).state in (JobState.CANCELLED, JobState.FAILED)
    except BadInput:
        return True  # it was pruned


def _whole_url(db: Database) -> str:
    """The database's URL as another process, in another folder, needs it."""
    scheme, slashes, file = db.url.partition("sqlite:///")
    return f"{scheme}{slashes}{Path(file).absolute()}" if slashes else db.url
