"""Demand: what the open jobs need of workers, and how many workers each need gets. Knows no Ray."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.prepare import cores
from db.records import JobState, OpenJob
from workers.pinned import EngineKey


@dataclass(frozen=True)
class Place:
    """What one worker holds of a node."""

    device: str  #: cpu or cuda
    threads: int
    gpus: float = 0.0  #: a share of one, or whole ones

    @property
    def resources(self) -> dict[str, float]:
        """As Ray counts them. A GPU worker that also held a core could wait for ever on a node with more GPUs."""
        return {"GPU": self.gpus} if self.device == "cuda" else {"CPU": float(self.threads)}

    @property
    def alone(self) -> bool:
        """Whether nobody else computes on what the worker holds."""
        return self.device == "cpu" or self.gpus >= 1

    def __str__(self) -> str:
        return ", ".join(f"{amount:g} {name}" for name, amount in self.resources.items())


@dataclass(frozen=True)
class Need:
    """What a worker must be to do a job: jobs of the same need share their workers, which keep the engine they hold."""

    place: Place
    engine: EngineKey | None  #: None: the job is still to be prepared


@dataclass(frozen=True)
class Duty:
    """What a worker is to do until it is told otherwise."""

    shards: tuple[int, ...] = ()  #: jobs of which it takes shards
    prepare: tuple[int, ...] = ()  #: jobs that it prepares, before all else


@dataclass
class Group:
    """The open jobs of one need."""

    need: Need
    jobs: list[OpenJob] = field(default_factory=list)

    @property
    def priority(self) -> int:
        return max(job.priority for job in self.jobs)

    @property
    def tasks(self) -> int:
        """Open ones: more workers than these would have nothing to do."""
        return sum(job.ready + job.leased for job in self.jobs)

    @property
    def duty(self) -> Duty:
        """What all of its workers do."""
        return Duty(shards=tuple(job.id for job in self.jobs)) if self.need.engine else Duty()


@dataclass(frozen=True)
class Shares:
    """How workers share what a node has."""

    gpus_per_worker: float = 1.0
    workers_a_node: int = 1  #: that share the cores of a node, where a job does not say how many threads it wants
    has_gpus: bool = False  #: whether a node of the cluster has any


def need_of(job: OpenJob, shares: Shares) -> Need:
    """What a worker must be to do the job's open tasks."""
    if job.state is JobState.PREPARING or job.pinned is None:
        return Need(_place(_device(job.spec, shares), _threads(job.spec, shares), shares), None)
    pinned = job.pinned
    return Need(_place(pinned.get("device", "cpu"), pinned.get("threads", 1), shares), EngineKey.of(pinned))


def _place(device: str, threads: int, shares: Shares) -> Place:
    return Place(device, threads, shares.gpus_per_worker if device == "cuda" else 0.0)


def _device(spec: dict[str, Any], shares: Shares) -> str:
    """Where a job is prepared is where `auto` is looked up: on a GPU where the cluster has one."""
    asked = spec.get("device", "auto")
    if asked != "auto":
        return str(asked)
    return "cuda" if shares.has_gpus else "cpu"


def _threads(spec: dict[str, Any], shares: Shares) -> int:
    return int(spec.get("threads") or max(1, cores() // shares.workers_a_node))


def grouped(jobs: Iterable[OpenJob], shares: Shares) -> list[Group]:
    """The jobs that have something to do, by need; in the order in which needs are served."""
    groups: dict[Need, Group] = {}
    for job in jobs:
        if job.ready or job.leased:
            need = need_of(job, shares)
            groups.setdefault(need, Group(need)).jobs.append(job)
    return sorted(groups.values(), key=lambda group: (-group.priority, group.jobs[0].id))


def allocate(groups: Sequence[Group], place_another: Callable[[Place], bool]) -> dict[Need, int]:
    """How many workers each need gets: in turns, one at a time, never more than it has open tasks.

    Needs of a higher priority are served before those of a lower one get any. place_another: finds room for one more
    worker of this place, and keeps it; False where there is none.
    """
    given = {group.need: 0 for group in groups}
    for priority in sorted({group.priority for group in groups}, reverse=True):
        wanting = [group for group in groups if group.priority == priority]
        while wanting:
            wanting = [
                group
                for group in wanting
                if given[group.need] < group.tasks and place_another(group.need.place) and _one_more(given, group.need)
            ]
    return given


def _one_more(given: dict[Need, int], need: Need) -> bool:
    given[need] += 1
    return True


class Room:
    """What the nodes have, given out worker by worker: on the node that it fills best."""

    def __init__(self, nodes: Iterable[dict[str, float]], most: int | None = None) -> None:
        """nodes: resources of each. most: workers in all, whatever there is room for."""
        self._free = [dict(node) for node in nodes]
        self._left = most

    def take(self, place: Place) -> bool:
        """Whether there was room for one more."""
        if self._left == 0:
            return False
        fitting = [node for node in self._free if _fits(place, node)]
        if not fitting:
            return False
        node = min(fitting, key=lambda node: sum(node.get(name, 0) for name in place.resources))
        for name, amount in place.resources.items():
            node[name] -= amount
        if self._left is not None:
            self._left -= 1
        return True


def _fits(place: Place, node: dict[str, float]) -> bool:
    return all(node.get(name, 0) + 1e-9 >= amount for name, amount in place.resources.items())


def fits_somewhere(place: Place, nodes: Iterable[dict[str, float]]) -> bool:
    """Whether an empty node would have room for a worker."""
    return any(_fits(place, node) for node in nodes)
