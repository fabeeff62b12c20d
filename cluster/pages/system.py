"""The system: who works, what waits, what failed."""

from dataclasses import asdict

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from cluster.api.access import Reader
from cluster.api.jobs import Shared
from cluster.pages.showing import PageRoute, show
from db import attention, listing
from db.keys import Scope

router = APIRouter(include_in_schema=False, route_class=PageRoute)

#: dead tasks, and jobs of the queue, that one page shows
MOST = 200


@router.get("/system")
def system(request: Request, caller: Reader, state: Shared) -> Response:
    """Workers, the queue, and dead tasks with their errors."""
    by_state, tasks = listing.counts(state.db)
    return show(
        request,
        caller,
        "system.html.j2",
        scripts=("live.js", "system.js"),
        workers=listing.workers(state.db),
        queue=attention.queue(state.db, MOST),
        dead=attention.dead_of_all(state.db, MOST),
        by_state=sorted(by_state.items()),
        tasks=sorted(tasks.items()),
        most=MOST,
        may_change=caller.may(Scope.SUBMIT),
        may_all=caller.may(Scope.ADMIN),
    )


@router.get("/system.json")
def numbers(caller: Reader, state: Shared) -> Response:
    """All that the page shows."""
    by_state, tasks = listing.counts(state.db)
    return JSONResponse(
        {
            "jobs": by_state,
            "tasks": [{"kind": kind, "state": of, "tasks": count} for (kind, of), count in sorted(tasks.items())],
            "workers": [asdict(worker) for worker in listing.workers(state.db)],
            "queue": [asdict(one) for one in attention.queue(state.db, MOST)],
            "dead": [asdict(one) for one in attention.dead_of_all(state.db, MOST)],
        }
    )
