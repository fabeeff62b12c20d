"""The list of jobs as it changes: one stream for all jobs of a page, because a browser opens few at once."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from time import monotonic
from typing import Annotated

import structlog
from fastapi import APIRouter, Query, Request
from starlette.responses import Response, StreamingResponse

from cluster.api.access import Reader, still_valid
from cluster.api.jobs import JobId, Shared
from cluster.api.problems import Problem
from cluster.api.state import State
from cluster.api.watching import BEAT_SECONDS, PROGRESS_SECONDS
from db import events, jobs
from db.errors import RecordError
from db.listing import summaries
from db.session import Database

log = structlog.get_logger()
router = APIRouter(include_in_schema=False)

#: jobs of one stream, and streams of one server
MOST_JOBS, MOST_STREAMS = 100, 500

Standing = dict[str, object]


@router.get("/live")
async def live(
    request: Request,
    caller: Reader,
    state: Shared,
    job: Annotated[list[JobId] | None, Query(max_length=MOST_JOBS)] = None,
) -> Response:
    """Server-sent events: of each job its state and progress when they change, and the newest job's number."""
    ids = tuple(sorted(set(job or [])))
    open_streams = getattr(request.app.state, "lists", 0)
    if open_streams >= MOST_STREAMS:
        raise Problem("unavailable", f"{MOST_STREAMS} streams are open; try again later.")
    stream = _stream(request, state, ids, lambda: still_valid(request, caller))
    return StreamingResponse(stream, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


async def _stream(
    request: Request, state: State, ids: tuple[int, ...], may_listen: Callable[[], Awaitable[bool]]
) -> AsyncIterator[bytes]:
    shared = request.app.state
    shared.lists = getattr(shared, "lists", 0) + 1
    told: dict[str, Standing] = {}
    beat_at = monotonic() + BEAT_SECONDS
    try:
        yield b"retry: 1000\n\n"
        while not state.hub.closing:
            try:
                found = await state.together.ask(("live", ids), lambda: _standing(state.db, ids))
            except RecordError as error:
                log.warning("jobs cannot be looked at", reason=str(error))
                found = told
            news = {name: standing for name, standing in found.items() if told.get(name) != standing}
            if news:
                told = found
                yield f"data: {json.dumps(news)}\n\n".encode()
            if monotonic() >= beat_at:
                beat_at = monotonic() + BEAT_SECONDS
                if not await may_listen():
                    return
                yield b": \n\n"
            await asyncio.sleep(PROGRESS_SECONDS)
    finally:
        shared.lists -= 1


def _standing(db: Database, ids: tuple[int, ...]) -> dict[str, Standing]:
    """By job, and as `newest` the highest number."""
    found: dict[str, Standing] = {}
    for job_id, (state, mark) in events.marks(db, ids).items():
        standing: Standing = {"state": state.value, "mark": mark}
        if not state.ended:
            standing["done"], standing["total"] = jobs.batches(db, job_id)
        found[str(job_id)] = standing
    newest = summaries(db, limit=1)
    return found | {"newest": {"job": newest[0].id if newest else 0}}
