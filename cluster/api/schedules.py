"""Schedules over HTTP: added, looked at, paused, triggered, removed."""

from dataclasses import asdict, dataclass
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Path, Query, Response
from pydantic_core import to_json
from starlette.responses import Response as PlainResponse

from cluster.api import examples
from cluster.api.access import Caller, Reader, Submitter
from cluster.api.jobs import JsonBody, Shared
from cluster.api.problems import Problem, described
from cluster.api.state import State, told
from cluster.schedules.latest import without_latest
from cluster.schedules.service import AddedSchedule, ScheduleDetails, Schedules, ScheduleSummary
from cluster.schedules.spec import parse_schedule
from db import schedules as record
from db.keys import Scope
from db.schedules import FiringRow, ScheduleRow

router = APIRouter(tags=["schedules"])

Name = Annotated[str, Path(max_length=100, pattern=r"^[\w.@+-]{1,100}$", description="the schedule's name")]


@dataclass(frozen=True)
class Resent:
    """Messages that are sent again."""

    messages: int


@router.post(
    "/v1/schedules",
    status_code=201,
    response_model=AddedSchedule,
    responses=described("conflict", "too-large", "wrong-media-type"),
    openapi_extra=examples.body("ScheduleSpec", examples.SCHEDULE),
)
async def add(caller: Submitter, body: JsonBody, state: Shared) -> Response:
    """Add a schedule: its job is checked as `/v1/validate` does, then it is written, and fires from now on.

    The secrets that sign its messages are answered this once.
    """

    def write() -> AddedSchedule:
        spec = parse_schedule(body)
        spec = spec.model_copy(update={"job": without_latest(spec.job, state.allowed.checked)})
        return state.service(caller.name).schedules.add(spec)

    done = await to_thread.run_sync(write, limiter=state.readers)
    headers = {"Location": f"/v1/schedules/{done.schedule.name}"}
    return Response(to_json(asdict(done)), 201, headers, media_type="application/json")


@router.get("/v1/schedules", response_model=list[ScheduleSummary], responses=described())
async def list_schedules(caller: Reader, state: Shared) -> Response:
    """The schedules by name, each with its last firing and the incident that is open."""
    return await told(lambda: state.service(caller.name).schedules.list())


@router.get("/v1/schedules/{name}", response_model=ScheduleDetails, responses=described("missing"))
async def show(
    name: Name,
    caller: Reader,
    state: Shared,
    limit: Annotated[int, Query(ge=1, le=1000, description="firings")] = 50,
) -> Response:
    """One schedule: its firings with their verdicts and what changed, and what its webhooks were told."""
    return await told(lambda: state.service(caller.name).schedules.show(name, limit=limit))


def own(state: State, caller: Caller, name: str) -> Schedules:
    """The schedules as who may change this one. Raises `Problem`, `Missing`."""
    principal = record.find(state.db, name).principal
    if principal != caller.name and not caller.may(Scope.ADMIN):
        raise Problem("forbidden", f"Schedule {name!r} is {principal!r}'s; take their key, or one with scope admin.")
    return state.service(caller.name).schedules


@router.post("/v1/schedules/{name}/pause", response_model=ScheduleRow, responses=described("missing"))
async def pause(name: Name, caller: Submitter, state: Shared) -> Response:
    """Let a schedule fire no more; a job that it began goes on."""
    return await told(lambda: own(state, caller, name).pause(name))


@router.post("/v1/schedules/{name}/resume", response_model=ScheduleRow, responses=described("missing"))
async def resume(name: Name, caller: Submitter, state: Shared) -> Response:
    """Let a schedule fire again, from now on."""
    return await told(lambda: own(state, caller, name).resume(name))


@router.post(
    "/v1/schedules/{name}/trigger",
    status_code=202,
    response_model=FiringRow,
    responses=described("missing", "conflict"),
)
async def trigger(name: Name, caller: Submitter, state: Shared) -> Response:
    """Fire now, paused or not."""
    return await told(lambda: own(state, caller, name).trigger(name), status_code=202)


@router.post("/v1/schedules/{name}/resend", response_model=Resent, responses=described("missing"))
async def resend(name: Name, caller: Submitter, state: Shared) -> Response:
    """Send again what the webhooks of a schedule did not take, dead letters included."""
    return await told(lambda: Resent(own(state, caller, name).resend(name)))


@router.delete("/v1/schedules/{name}", status_code=204, responses=described("missing"))
async def remove(name: Name, caller: Submitter, state: Shared) -> PlainResponse:
    """Remove a schedule with its history; its jobs stay."""
    await to_thread.run_sync(lambda: own(state, caller, name).remove(name))
    return PlainResponse(status_code=204)
