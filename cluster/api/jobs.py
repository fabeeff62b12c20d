"""Jobs over HTTP: submitted, watched, changed, reported."""

from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from pydantic_core import to_json
from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse

from cluster.api import examples
from cluster.api.access import Caller, Reader, Submitter, still_valid
from cluster.api.cursors import cursor, keys_of
from cluster.api.limits import read_json
from cluster.api.problems import described
from cluster.api.state import State, StateOf, told
from cluster.local import Local
from cluster.prepare import Validation
from cluster.reports.model import JobReport
from cluster.reports.page import render_page
from cluster.service import JobDetails, Retried
from cluster.spec import parse_job
from db import events, jobs
from db.listing import JobSummary, summaries
from db.records import JobRow, JobState
from engine.errors import BadInput

router = APIRouter(tags=["jobs"])

JobId = Annotated[int, Path(ge=1, le=2**63 - 1, description="the job's number")]
Shared = Annotated[State, StateOf]
#: stands behind the caller in every signature: what nobody may send is not read
JsonBody = Annotated[Any, Depends(read_json)]
_TEXT = r"^[^\x00-\x1f\x7f]*$"
IdempotencyKey = Annotated[
    str | None,
    Header(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$", description="the same again is the same job"),
]


@dataclass(frozen=True)
class Submitted:
    """A job that was written, or that the key stands for."""

    job: int


@dataclass(frozen=True)
class Before:
    """A job that found what a spec's would find."""

    job: int | None  #: null where something changed


@dataclass(frozen=True)
class JobPage:
    """A page of the list of jobs, newest first."""

    jobs: list[JobSummary]
    next: str | None  #: the cursor of the next page; null on the last


@dataclass(frozen=True)
class Added:
    """A policy that was added to a finished job, which goes on."""

    job: int
    policy: str  #: its label


@router.post(
    "/v1/jobs",
    status_code=202,
    response_model=Submitted,
    responses=described("conflict", "too-large", "wrong-media-type"),
    openapi_extra=examples.body("JobSpec", examples.JOB),
)
async def submit(caller: Submitter, body: JsonBody, state: Shared, idempotency_key: IdempotencyKey = None) -> Response:
    """Submit a job: written at once, prepared and worked on later.

    With an `Idempotency-Key` the request may be sent again: the same key and spec are the same job.
    """

    def write() -> Submitted:
        spec = state.allowed.checked(parse_job(body))
        return Submitted(state.service(caller.name).submit(spec, key=idempotency_key))

    done = await to_thread.run_sync(write)
    return JSONResponse(asdict(done), 202, {"Location": f"/v1/jobs/{done.job}"})


@router.post(
    "/v1/validate",
    response_model=Validation,
    responses=described("too-large", "wrong-media-type"),
    openapi_extra=examples.body("JobSpec", examples.JOB),
)
async def validate(caller: Submitter, body: JsonBody, state: Shared) -> Response:
    """Check a spec and say what its job would do; nothing is written."""

    def check() -> Validation:
        return state.service(caller.name).validate(state.allowed.checked(parse_job(body)))

    return await told(check, limiter=state.readers)


@router.post(
    "/v1/done-before",
    response_model=Before,
    responses=described("too-large", "wrong-media-type"),
    openapi_extra=examples.body("JobSpec", examples.JOB),
)
async def done_before(caller: Submitter, body: JsonBody, state: Shared) -> Response:
    """The finished job that found what this spec's would find: for a script that runs only what changed."""

    def look() -> Before:
        return Before(state.service(caller.name).done_before(state.allowed.checked(parse_job(body))))

    return await told(look, limiter=state.readers)


@router.get("/v1/jobs", response_model=JobPage, responses=described())
async def list_jobs(
    caller: Reader,
    state: Shared,
    state_is: Annotated[list[JobState] | None, Query(alias="state", description="only jobs in one of these")] = None,
    search: Annotated[
        str | None, Query(max_length=200, pattern=_TEXT, description="part of the name or the model")
    ] = None,
    principal: Annotated[str | None, Query(max_length=200, pattern=_TEXT, description="whose jobs")] = None,
    cursor_: Annotated[str | None, Query(alias="cursor", max_length=100, description="`next` of a page")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
) -> Response:
    """The jobs, newest first."""
    before = None if cursor_ is None else keys_of(cursor_, 1)[0]

    states = frozenset(state_is or ())

    def page() -> bytes:
        found = summaries(state.db, before=before, limit=limit + 1, states=states, search=search, principal=principal)
        return to_json(JobPage(found[:limit], cursor(found[limit - 1].id) if len(found) > limit else None))

    content = await state.together.ask(("jobs", before, limit, states, search, principal), page)
    return Response(content, media_type="application/json")


@router.get("/v1/jobs/{job_id}", response_model=JobDetails, responses=described("missing"))
async def show(job_id: JobId, caller: Reader, state: Shared) -> Response:
    """One job: its state, how far it is, its spec, its runs, its dead tasks."""
    return await told(lambda: state.service(caller.name).job(job_id))


def own(state: State, caller: Caller, job_id: int) -> Local:
    """The service as who may change this job. Raises `Problem`, `Missing`."""
    caller.check_owns(jobs.job(state.db, job_id).principal, job_id)
    return state.service(caller.name)


@router.post("/v1/jobs/{job_id}/cancel", response_model=JobRow, responses=described("missing", "conflict"))
async def cancel(job_id: JobId, caller: Submitter, state: Shared) -> Response:
    """End a job before its time; what is done is kept."""
    return await told(lambda: own(state, caller, job_id).cancel(job_id))


@router.post("/v1/jobs/{job_id}/pause", response_model=JobRow, responses=described("missing", "conflict"))
async def pause(job_id: JobId, caller: Submitter, state: Shared) -> Response:
    """Let no more shards of a job begin; those in hand are finished."""
    return await told(lambda: own(state, caller, job_id).pause(job_id))


@router.post("/v1/jobs/{job_id}/retry", response_model=Retried, responses=described("missing", "conflict"))
async def retry(job_id: JobId, caller: Submitter, state: Shared) -> Response:
    """Give the dead tasks of a job fresh attempts."""
    return await told(lambda: own(state, caller, job_id).retry(job_id))


@router.post("/v1/jobs/{job_id}/resume", response_model=Retried, responses=described("missing", "conflict"))
async def resume(job_id: JobId, caller: Submitter, state: Shared) -> Response:
    """Let a job go on that was paused or failed."""
    return await told(lambda: own(state, caller, job_id).resume(job_id))


@router.post(
    "/v1/jobs/{job_id}/policies",
    status_code=202,
    response_model=Added,
    responses=described("missing", "conflict", "too-large", "wrong-media-type"),
    openapi_extra=examples.body(None, examples.POLICY),
)
async def add_policy(job_id: JobId, caller: Submitter, body: JsonBody, state: Shared) -> Response:
    """Give a job that is done one more policy, in any form that a spec takes; only its runs are computed."""
    if not isinstance(body, str | dict):
        raise BadInput("policy: give a name, or a mapping of a name to its options.")
    return await told(lambda: Added(job_id, own(state, caller, job_id).add_policy(job_id, body)), status_code=202)


@router.get(
    "/v1/jobs/{job_id}/report",
    response_model=JobReport,
    responses=described("missing") | {200: {"content": {"text/html": {"schema": {"type": "string"}}}}},
)
async def report(
    job_id: JobId,
    caller: Reader,
    state: Shared,
    form: Annotated[Literal["json", "html"], Query(alias="format")] = "json",
    tokens: Annotated[bool, Query(description="examples token by token")] = True,
) -> Response:
    """What a job found; of one under way the sums so far, marked partial. HTML is one file that needs nothing else."""

    def build() -> Response:
        found = state.service(caller.name).report(job_id, with_tokens=tokens)
        if form == "html":
            return HTMLResponse(render_page(found))
        return Response(found.model_dump_json(), media_type="application/json")

    return await to_thread.run_sync(build, limiter=state.readers)


@router.get(
    "/v1/jobs/{job_id}/events",
    response_class=StreamingResponse,
    responses=described("missing")
    | {
        200: {
            "description": "Server-sent events; as JSON those that there are",
            "content": {
                "text/event-stream": {"schema": {"type": "string"}},
                "application/json": {"schema": {"type": "array", "items": {"type": "object"}}},
            },
        },
        204: {"description": "The job has ended, and nothing happened since that event"},
    },
)
async def watch(
    request: Request,
    job_id: JobId,
    caller: Reader,
    state: Shared,
    last_event_id: Annotated[int | None, Header(ge=0, le=2**63 - 1, description="go on behind this event")] = None,
    form: Annotated[
        Literal["stream", "json"], Query(alias="format", description="json: what has happened, and no more")
    ] = "stream",
) -> Response:
    """What happens to a job, as it happens: events `job` with an id, and `progress` without.

    The stream ends with the job; one who comes back with its last id is told to stay away (204).
    """
    row = await to_thread.run_sync(jobs.job, state.db, job_id)
    after = last_event_id or 0
    if form == "json":
        return await told(lambda: events.events(state.db, job_id, after))
    if row.state.ended and last_event_id is not None:
        more = partial(events.events, state.db, job_id, after, 1)
        if not await to_thread.run_sync(more):
            return Response(status_code=204)
    state.hub.check_room()
    stream: AsyncIterator[bytes] = state.hub.stream(job_id, after, lambda: still_valid(request, caller))
    return StreamingResponse(stream, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
