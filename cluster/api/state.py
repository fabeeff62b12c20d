"""What the rooms of the API share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, Request, Response
from pydantic_core import to_json

from cluster.api.allowed import Allowed
from cluster.api.limits import Rate
from cluster.api.together import Together
from cluster.api.watching import Hub
from cluster.local import Local
from cluster.metrics import Metrics
from cluster.settings import Settings
from cluster.status import Watcher
from db.session import Database

#: that read or write a little; more of them would only wait for one another
THREADS = 8
#: questions at once: each has a connection of its own, and may take all its time
QUESTIONS = 4
#: reports and dry runs at once: they may load a tokenizer, or read a benchmark
READERS = 2
#: of somebody who shows no valid key: a second, by address
STRANGERS_PER_SECOND = 10


@dataclass
class State:
    """One server's."""

    db: Database
    settings: Settings
    is_loopback: bool  #: whether it answers to this machine only
    hub: Hub
    rate: Rate
    metrics: Metrics
    watcher: Watcher
    together: Together = field(default_factory=Together)
    strangers: Rate = field(default_factory=lambda: Rate(STRANGERS_PER_SECOND))
    questions: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(QUESTIONS))
    readers: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(READERS))

    @property
    def uploads(self) -> Path:
        return self.settings.uploads

    @property
    def allowed(self) -> Allowed:
        return Allowed(self.settings.allow, self.uploads)

    def service(self, who: str) -> Local:
        """The service as this principal uses it."""
        return Local(self.settings, self.db, who=who)


async def told(do: Callable[[], object], *, status_code: int = 200, limiter: CapacityLimiter | None = None) -> Response:
    """What `do` returns, as JSON: both in one thread, which costs half of what FastAPI's way through three does."""

    def make() -> bytes:
        return to_json(do(), inf_nan_mode="null")

    content = await to_thread.run_sync(make, limiter=limiter)
    return Response(content, status_code, media_type="application/json")


async def _state(request: Request) -> State:
    return request.app.state.shortstop


StateOf = Depends(_state)
