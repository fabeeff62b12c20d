"""What the supervisor knows of its workers, and of nodes that are bad for them. Knows no Ray."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cluster.fleet.demand import Duty, Need
from workers.pinned import EngineKey
from workers.worker import Pulse

#: deaths of workers on one node, no shard finished there in between, after which it is avoided
NODE_DEATHS = 3
#: for how long; then it gets another chance
AVOID_SECONDS = 600.0
LONGEST_PAUSE_SECONDS = 30.0


@dataclass(eq=False)
class Member:
    """A worker of the fleet, from its hiring to its end."""

    name: str  #: with the host behind it once it is ready
    actor: Any
    need: Need  #: what it is there for
    hired: float  #: by the monotonic clock, as all times here
    ready: Any  #: reference of its first pulse
    node: str | None = None  #: known once it is ready
    working: Any = None  #: reference of `serve`, once it is ready
    lost: float | None = None  #: when contact was lost; `working` then is a pulse that tells what became of it
    duty: Duty = field(default_factory=Duty)  #: as it was last told
    draining: float | None = None  #: since when
    pulse: Pulse | None = None  #: the last one
    asked: Any = None  #: reference of the next one
    asked_at: float = 0.0
    idle_since: float | None = None  #: since when it has had nothing to do
    cancelled_since: float | None = None  #: since when it has been at a job that is over

    @property
    def present(self) -> bool:
        """Whether it is ready and has not been asked to leave."""
        return self.node is not None and self.draining is None

    @property
    def host(self) -> str:
        return self.name.partition("@")[2]


@dataclass
class _Losses:
    """Deaths in a row, no shard finished in between."""

    deaths: int = 0
    until: float = 0.0  #: nothing is tried before then


class Blame:
    """Which nodes keep killing workers, which cannot do what a job pins, and how long to wait before the next try."""

    def __init__(self) -> None:
        self._nodes: dict[str, _Losses] = {}
        self._needs: dict[Need, _Losses] = {}
        self._unfit: dict[EngineKey, dict[str, float]] = {}
        self.reasons: dict[EngineKey, str] = {}  #: the last refusal of each engine

    def died(self, member: Member) -> bool:
        """Count a death of a worker whose node lives. True where its node is avoided from now on."""
        of_need = self._needs.setdefault(member.need, _Losses())
        of_need.deaths += 1
        of_need.until = time.monotonic() + min(0.25 * 2 ** min(of_need.deaths, 10), LONGEST_PAUSE_SECONDS)
        if member.node is None:
            return False
        of_node = self._nodes.setdefault(member.node, _Losses())
        of_node.deaths += 1
        if of_node.deaths < NODE_DEATHS or of_node.until > time.monotonic():
            return False
        of_node.until = time.monotonic() + AVOID_SECONDS
        return True

    def worked(self, member: Member) -> None:
        """A shard was finished."""
        self._needs.pop(member.need, None)
        if member.node is not None:
            self._nodes.pop(member.node, None)

    def refused(self, member: Member, reason: str) -> None:
        """The worker's machine cannot do what the job pins."""
        assert member.need.engine is not None
        assert member.node is not None
        self._unfit.setdefault(member.need.engine, {})[member.node] = time.monotonic() + AVOID_SECONDS
        self.reasons[member.need.engine] = reason

    def deaths(self, need: Need) -> int:
        return self._needs.get(need, _Losses()).deaths

    def waits(self, need: Need) -> bool:
        """Whether workers for this need died a moment ago."""
        return self._needs.get(need, _Losses()).until > time.monotonic()

    def unfit(self, engine: EngineKey | None) -> set[str]:
        """The nodes that cannot hold the engine."""
        now = time.monotonic()
        return {node for node, until in self._unfit.get(engine, {}).items() if until > now} if engine else set()

    def avoided(self, nodes: Iterable[str]) -> set[str]:
        """Those of the nodes that keep killing workers; none where all do, for then there is nowhere else to go."""
        now, nodes = time.monotonic(), set(nodes)
        found = {node for node in nodes if node in self._nodes and self._nodes[node].deaths >= NODE_DEATHS}
        found = {node for node in found if self._nodes[node].until > now}
        return set() if found == nodes else found
