"""For probes: whether the process lives, whether it can serve, how much there is to do."""

from fastapi import APIRouter
from starlette.responses import PlainTextResponse

from cluster.api.access import Reader
from cluster.api.jobs import Shared
from cluster.api.problems import described, streams
from cluster.metrics import CONTENT_TYPE
from db import events

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
def metrics(caller: Reader, state: Shared) -> PlainTextResponse:
    """How much there is, as Prometheus reads it."""
    return PlainTextResponse(state.metrics.text(), media_type=CONTENT_TYPE)
