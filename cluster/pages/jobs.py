"""The list of jobs, and how one is submitted."""

import secrets
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlencode

import yaml
from anyio import to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from cluster.api.access import Reader, Submitter
from cluster.api.cursors import cursor, keys_of
from cluster.api.jobs import Shared
from cluster.api.limits import check_json
from cluster.api.state import State
from cluster.pages.forms import Changes, Posted
from cluster.pages.showing import PageRoute, see_other, show
from cluster.prepare import Validation
from cluster.spec import parse_job
from db import events, jobs
from db.listing import JobSummary, summaries
from db.records import JobState
from db.session import Database
from engine.errors import BadInput

router = APIRouter(include_in_schema=False, route_class=PageRoute)

PAGE = 50
#: characters of a spec that is typed in
LONGEST = 100_000
#: what a new job starts from
TEMPLATE = """\
name: nightly
model: smollm2-135m
exits: smollm2-135m
generation: {max_new_tokens: 10, batch_size: 8}
benchmarks:
  - humaneval-lines
policies:
  - full
  - {confidence: {threshold: 0.95}}
  - {sec: {exit: 0.9, stop: 0.7}}
"""
_TEXT = r"^[^\x00-\x1f\x7f]*$"


@dataclass(frozen=True)
class Line:
    """A job of the list, and how far it is while it has not ended."""

    job: JobSummary
    done: int | None
    total: int | None
    #: state and last event that it shows: what a stream tells first may be later. Empty: it shows what has passed
    told: str


@router.get("/")
def list_jobs(
    request: Request,
    caller: Reader,
    state: Shared,
    state_is: Annotated[list[str] | None, Query(alias="state")] = None,
    search: Annotated[str, Query(max_length=200, pattern=_TEXT)] = "",
    principal: Annotated[str, Query(max_length=200, pattern=_TEXT)] = "",
    cursor_: Annotated[str, Query(alias="cursor", max_length=100)] = "",
) -> Response:
    """The jobs, newest first."""
    asked = [word for word in state_is or [] if word]
    wrong = [word for word in asked if word not in list(JobState)]
    if wrong:
        raise BadInput(f"state {wrong[0]!a}: give one of {', '.join(JobState)}.")
    found = summaries(
        state.db,
        before=keys_of(cursor_, 1)[0] if cursor_ else None,
        limit=PAGE + 1,
        states=frozenset(asked),
        search=search or None,
        principal=principal or None,
    )
    marks = events.marks(state.db, [row.id for row in found])
    newest = summaries(state.db, limit=1)
    filters = [*(("state", word) for word in asked), ("search", search), ("principal", principal)]
    filters = [(name, value) for name, value in filters if value]
    more = cursor(found[PAGE - 1].id) if len(found) > PAGE else None
    return show(
        request,
        caller,
        "jobs.html.j2",
        scripts=("live.js", "jobs.js"),
        lines=[_line(state.db, row, *marks[row.id]) for row in found[:PAGE] if row.id in marks],
        states=list(JobState),
        asked=asked,
        search=search,
        principal=principal,
        is_first=not cursor_,
        newest=newest[0].id if newest else 0,
        next_url=None if more is None else f"/?{urlencode([*filters, ('cursor', more)])}",
        first_url=f"/?{urlencode(filters)}" if filters else "/",
        json_url=f"/v1/jobs?{urlencode([*filters, ('limit', '1000')])}",
    )


def _line(db: Database, row: JobSummary, state: JobState, mark: int) -> Line:
    done, total = (None, None) if row.state.ended else jobs.batches(db, row.id)
    return Line(row, done, total, told=f"{state} {mark}" if state == row.state else "")


@router.get("/submit")
def new_job(request: Request, caller: Submitter) -> Response:
    """The page where a job is written."""
    return _submit_page(request, caller, TEMPLATE)


@router.post("/submit")
async def submit(request: Request, posted: Changes, state: Shared) -> Response:
    """Submit what was written, or say what it would do."""
    limiter = state.readers if posted.form.get("do") == "validate" else None
    return await to_thread.run_sync(_submitted, request, posted, state, limiter=limiter)


def _submitted(request: Request, posted: Posted, state: State) -> Response:
    written = posted.text("spec")
    try:
        spec = state.allowed.checked(parse_job(read_yaml_text(written)))
        service = state.service(posted.caller.name)
        if posted.form.get("do") == "validate":
            return _submit_page(request, posted.caller, written, found=service.validate(spec))
        return see_other(f"/jobs/{service.submit(spec, key=posted.form.get('once') or None)}")
    except ValueError as error:  # BadInput of engine and record
        return _submit_page(request, posted.caller, written, complaint=str(error))


def _submit_page(
    request: Request, caller: Any, written: str, *, found: Validation | None = None, complaint: str | None = None
) -> Response:
    return show(
        request,
        caller,
        "submit.html.j2",
        status=422 if complaint else 200,
        save=False,
        scripts=("submit.js",),
        written=written,
        found=found,
        complaint=complaint,
        once=secrets.token_hex(16),  # a form that is sent twice is one job
    )


def read_yaml_text(written: str) -> Any:
    """YAML as a browser sent it. Raises `BadInput`."""
    if len(written) > LONGEST:
        raise BadInput(f"spec: it has more than {LONGEST:,} characters; upload the data and name the upload.")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(written, yaml.SafeLoader)):
            raise BadInput("spec: it refers to itself by an alias (*); write it out.")  # a few lines may mean billions
        value = yaml.safe_load(written)
        check_json(value)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        raise BadInput(
            f"spec: it is not YAML{place} ({getattr(error, 'problem', None) or error}); correct it."
        ) from None
    except RecursionError:
        raise BadInput("spec: it is nested too deeply; make it flat.") from None
    except BadInput:
        raise
    except ValueError as error:
        raise BadInput(f"spec: {error}; correct it.") from None
    if not isinstance(value, dict):
        raise BadInput("spec: give a mapping of field to value, such as `model: smollm2-135m`.")
    return value
