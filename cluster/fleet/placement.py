"""Ray itself: connecting and leaving, what its nodes have, and what is asked of an autoscaler."""

import logging
import re
import socket
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import ray
from ray._private.state import state
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayActorError, RayError

from cluster.errors import FleetError
from cluster.fleet.demand import Place
from db.errors import BadInput
from db.session import Database

#: nothing of ours travels through Ray's object store
OBJECT_STORE_BYTES = 80 * 2**20
#: a head that does not take a connection by then is not there
REACH_SECONDS = 5.0
#: places that an autoscaler is asked for at most; it has a limit of its own
MOST_REQUESTED = 1000


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, or what Ray takes for one."""

    id: str
    host: str
    resources: dict[str, float]  #: all it has, used or not

    def __str__(self) -> str:
        return f"{self.host} ({self.id[:8]})"


class Placement:
    """The connection to Ray."""

    def __init__(self, address: str | None) -> None:
        """address: of a running cluster; a local one is started when absent."""
        self.address = address
        self.nodes: list[Node] = []  #: those that were alive at the last look
        self.leaving: set[str] = set()  #: of them, those that are about to go
        self._started = False
        self._requested: list[dict[str, float]] = []

    def connect(self, cpus: int) -> None:
        """cpus: that a local Ray says it has. Raises `BadInput`, `FleetError`."""
        if ray.is_initialized():
            return
        options: dict[str, Any] = {"address": self.address or "local"}
        if self.address is None:
            options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES, "num_cpus": cpus}
        else:
            _reach(self.address)
        try:
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            raise self._refused(error) from None
        self._started = True

    def _refused(self, error: Exception) -> Exception:
        if "ersion mismatch" in str(error):
            there, here = _versions(str(error))
            return BadInput(
                f"Ray at {self.address!r} is of another version than this machine's: {there} there, {here} here; "
                "install the same Ray and Python on both."
            )
        if self.address is None:
            return FleetError(f"Ray on this machine cannot be had ({reason(error)}); work inline.")
        return _unreachable(self.address, reason(error))

    def leave(self) -> None:
        """End what `connect` began."""
        if self._started:
            ray.shutdown()
            self._started = False

    def look(self) -> bool:
        """See which nodes there are. True where one is new.

        A spot machine that is called back, or one that is scaled down, is leaving: whoever hears of it says so with
        `ray drain-node`, as autoscalers do.
        """
        before = {node.id for node in self.nodes}
        self.nodes = [
            Node(node["NodeID"], node["NodeManagerHostname"], node["Resources"])
            for node in ray.nodes()
            if node["Alive"]
        ]
        self.leaving = set(state.get_draining_nodes())
        return bool({node.id for node in self.nodes} - before)

    def is_alive(self, node_id: str | None) -> bool:
        """Now, and as far as Ray knows by now."""
        return node_id is None or any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())

    def named(self, node_id: str | None) -> str:
        """A node, for messages."""
        known = [str(node) for node in self.nodes if node.id == node_id]
        return known[0] if known else "a node that is gone" if node_id else "a node that is not known"

    def most(self, kind: str) -> float:
        """The most that one node has of `CPU` or `GPU`."""
        return max((node.resources.get(kind, 0) for node in self.nodes), default=0)

    def seem_placed(self, places: Sequence[Place]) -> bool:
        """Whether what is in use is just what these places are: they are all given out, to processes that may still be
        starting. Where others use something, too, nobody can tell.
        """
        free = ray.available_resources()
        for kind in ("CPU", "GPU"):
            used = sum(node.resources.get(kind, 0) for node in self.nodes) - free.get(kind, 0)
            if abs(used - sum(place.resources.get(kind, 0) for place in places)) > 1e-6:
                return False
        return True

    def why_not(self, place: Place, held_by: Collection[int]) -> str:
        """Why no worker finds such a place. held_by: the jobs whose workers of ours hold places of the kind."""
        [(kind, amount)] = place.resources.items()
        if self.most(kind) < amount:
            return f"each asks for {place}, and no node has more than {self.most(kind):g}"
        total = sum(node.resources.get(kind, 0) for node in self.nodes)
        used = total - ray.available_resources().get(kind, 0)
        by = f"job {', '.join(map(str, sorted(held_by)))}" if held_by else "others"
        asked = f"a free {kind}" if amount == 1 else f"{place} free"
        return f"no node has {asked}: {used:g} of {total:g} in use by {by}"

    def request(self, places: Sequence[Place]) -> None:
        """Ask an autoscaler for so many places, all in all; none: what was asked for before is not needed any more."""
        bundles = [dict(place.resources) for place in places[:MOST_REQUESTED]]
        if self.address is not None and bundles != self._requested:
            request_resources(bundles=bundles)
            self._requested = bundles

    def out_of_reach(self, db: Database) -> set[str]:
        """The nodes from which the database cannot be opened, because it is a file on this machine."""
        here = socket.gethostname()
        return {node.id for node in self.nodes if node.host != here} if db.dialect == "sqlite" else set()

    def refuse_scattered_sqlite(self, db: Database) -> None:
        """Raises `BadInput` where workers would be on other machines than the file."""
        here = socket.gethostname()
        elsewhere = {node.host for node in self.nodes if node.id in self.out_of_reach(db)}
        if elsewhere:
            raise BadInput(
                f"database {db.url!r}: SQLite serves workers on one machine only, but Ray has "
                f"{', '.join(sorted(elsewhere))} beside {here}; use a PostgreSQL database."
            )


def _reach(address: str) -> None:
    """Ray itself waits for a minute before it says that nobody answers. Raises `BadInput`."""
    if "://" in address:
        raise BadInput(
            f"Ray address {address!r} is one for Ray's clients, who see neither nodes nor their loss; give the head's "
            "own, like 10.0.0.1:6379, on a machine of the cluster."
        )
    try:
        parts = urlsplit(f"//{address}")
        port = parts.port
    except ValueError:
        raise BadInput(f"Ray address {address!r} has no port that could be; write it like 10.0.0.1:6379.") from None
    if not parts.hostname or port is None:  # auto, local: Ray knows
        return
    try:
        socket.create_connection((parts.hostname, port), timeout=REACH_SECONDS).close()
    except OSError as error:
        raise _unreachable(address, error.strerror or str(error)) from None


def _unreachable(address: str, why: str) -> BadInput:
    return BadInput(f"Ray at {address!r} cannot be reached ({why}); correct the Ray address, or start a head there.")


def _versions(message: str) -> tuple[str, str]:
    """The cluster's versions of Ray and Python, and this process's, out of what Ray says."""
    found = [f"{name} {number}" for name, number in re.findall(r"^\s*(Ray|Python): (\S+)$", message, re.MULTILINE)]
    return " and ".join(found[:2]), " and ".join(found[2:4])


def reason(error: BaseException) -> str:
    """What Ray says of a failure, without the pages around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, RayActorError):  # the last line is the reason, be it Ray's own or that of a traceback
        return lines[-1].split(" Some common causes")[0]
    return lines[0]


def wait(references: Sequence[Any], seconds: float) -> list[Any]:
    """The references that are answered, at the latest after so many seconds."""
    if not references:
        time.sleep(seconds)
        return []
    return list(ray.wait(list(references), num_returns=len(references), timeout=0)[0]) or list(
        ray.wait(list(references), timeout=seconds)[0]
    )
