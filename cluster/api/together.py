"""One look at the record for all who ask the same at the same time, as browsers do that watch the list of jobs."""

import asyncio
from collections.abc import Callable, Hashable
from typing import Any

from anyio import to_thread


class Together:
    """Each asker gets an answer that was looked up after it asked: who comes while one is being looked up waits for the
    next, which all who wait share.
    """

    def __init__(self) -> None:
        self._running: dict[Hashable, asyncio.Task[Any]] = {}
        self._waiting: dict[Hashable, asyncio.Task[Any]] = {}

    async def ask(self, question: Hashable, look: Callable[[], Any]) -> Any:
        """What `look` returns, done in a thread; question: the same for all that may share it."""
        turn = self._waiting.get(question)
        if turn is None:
            turn = asyncio.create_task(self._turn(question, self._running.get(question), look))
            turn.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever asked may be gone
            self._waiting[question] = turn
        return await asyncio.shield(turn)

    async def _turn(self, question: Hashable, before: "asyncio.Task[Any] | None", look: Callable[[], Any]) -> Any:
        if before is not None:
            await asyncio.wait([before])
        mine = self._running[question] = self._waiting.pop(question)
        try:
            return await to_thread.run_sync(look)
        finally:
            if self._running.get(question) is mine:
                del self._running[question]
