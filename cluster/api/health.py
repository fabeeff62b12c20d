"""For probes: whether the process lives, whether it can serve, how much there is to do."""

from fastapi import APIRouter
from starlette.responses import PlainTextResponse

from cluster.api.access import Reader
from cluster.api.jobs import Shared
from cluster.api.problems import described, streams
from db import events, listing
from db.session import Database

router = APIRouter(tags=["probes"])

_TEXT = streams("text/plain")


@router.get("/healthz", response_class=PlainTextResponse, responses=_TEXT)
async def healthz() -> str:
    """The process lives."""
    return "ok\n"


@router.get("/readyz", response_class=PlainTextResponse, responses=_TEXT | described())
def readyz(state: Shared) -> str:
    """The database answers."""
    events.marks(state.db, [])
    return "ok\n"


@router.get("/metrics", response_class=PlainTextResponse, responses=_TEXT | described())
def metrics(caller: Reader, state: Shared) -> str:
    """How much there is, as Prometheus reads it."""
    return exposition(state.db)


def exposition(db: Database) -> str:
    """Prometheus' text format: jobs by state, open tasks by kind and state."""
    jobs, tasks = listing.counts(db)
    lines = [
        "# HELP shortstop_jobs Jobs in the record.",
        "# TYPE shortstop_jobs gauge",
        *(f'shortstop_jobs{{state="{state}"}} {count}' for state, count in sorted(jobs.items())),
        "# HELP shortstop_tasks Tasks of jobs that have not ended.",
        "# TYPE shortstop_tasks gauge",
        *(
            f'shortstop_tasks{{kind="{kind}",state="{state}"}} {count}'
            for (kind, state), count in sorted(tasks.items())
        ),
    ]
    return "\n".join(lines) + "\n"
