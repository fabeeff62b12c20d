"""What went wrong, as `application/problem+json` (RFC 9457) with types that never change their meaning."""

from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

import cluster.errors
import db.errors
import engine.errors

log = structlog.get_logger()

MEDIA_TYPE = "application/problem+json"
PREFIX = "urn:shortstop:problem:"

#: type -> (status, title)
TYPES = {
    "bad-request": (400, "The request cannot be read"),
    "unauthenticated": (401, "A valid API key is needed"),
    "forbidden": (403, "This key may not do that"),
    "cross-site": (403, "The request comes from another site"),
    "missing": (404, "There is no such thing"),
    "method-not-allowed": (405, "Not in this way"),
    "not-acceptable": (406, "Not in this form"),
    "conflict": (409, "What is there stands against it"),
    "too-large": (413, "Too much at once"),
    "wrong-media-type": (415, "Not in this form"),
    "misdirected": (421, "This server answers to other names"),
    "bad-input": (422, "What was asked for cannot be done"),
    "too-many-requests": (429, "Too fast"),
    "internal": (500, "The server failed"),
    "unavailable": (503, "The database or the server is busy"),
}
_BY_STATUS = {status: slug for slug, (status, _) in reversed(TYPES.items())}


class ProblemDetails(BaseModel):
    """What went wrong; `detail` is one sentence with field, value and remedy."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "type": f"{PREFIX}missing",
                "title": "There is no such thing",
                "status": 404,
                "detail": "job 99 does not exist; `shortstop list` shows those that do.",
            }
        }
    )

    type: str = Field(description=f"one of {', '.join(PREFIX + slug for slug in TYPES)}")
    title: str
    status: int
    detail: str
    errors: list[dict[str, Any]] | None = Field(None, description="of bad-input: each parameter that is wrong, and why")


class Problem(Exception):
    """Ends a request with a problem of one of `TYPES`."""

    def __init__(self, slug: str, detail: str, *, headers: dict[str, str] | None = None, **more: Any) -> None:
        super().__init__(detail)
        self.slug, self.detail, self.headers, self.more = slug, detail, headers or {}, more


def answer(slug: str, detail: str, headers: dict[str, str] | None = None, **more: Any) -> JSONResponse:
    """The response that tells of a problem."""
    status, title = TYPES[slug]
    content = {"type": PREFIX + slug, "title": title, "status": status, "detail": detail, **more}
    return JSONResponse(content, status, headers, MEDIA_TYPE)


#: of OpenAPI: what an operation may answer, by status
Responses = dict[int | str, dict[str, Any]]


def streams(*media_types: str) -> Responses:
    """Of OpenAPI: a good answer that may also come as one of these."""
    return {200: {"content": {kind: {"schema": {"type": "string"}} for kind in media_types}}}


def described(*slugs: str) -> Responses:
    """Of OpenAPI: the problems that an operation may end with, beside those that every one may."""
    of_all = ("bad-request", "unauthenticated", "forbidden", "misdirected", "bad-input", "too-many-requests")
    statuses = sorted({TYPES[slug][0] for slug in (*of_all, "unavailable", *slugs)})
    schema = {"$ref": "#/components/schemas/ProblemDetails"}
    return {
        status: {"description": TYPES[_BY_STATUS[status]][1], "content": {MEDIA_TYPE: {"schema": schema}}}
        for status in statuses
    }


def tell_problems(app: FastAPI) -> None:
    """Whatever ends a request comes out as a problem."""
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    for error in (engine.errors.EngineError, db.errors.RecordError, cluster.errors.ClusterError):
        app.add_exception_handler(error, _on_ours)
    app.add_exception_handler(Exception, _on_bug)


async def _on_problem(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Problem)
    return answer(error.slug, error.detail, error.headers, **error.more)


async def _on_ours(request: Request, error: Exception) -> JSONResponse:
    for kind, slug in (
        (db.errors.Missing, "missing"),
        (db.errors.Conflict, "conflict"),
        ((db.errors.BadInput, engine.errors.BadInput), "bad-input"),
    ):
        if isinstance(error, kind):
            return answer(slug, str(error))
    if isinstance(error, db.errors.Unavailable):
        log.warning("database unavailable", path=request.url.path, reason=str(error))
        return answer("unavailable", "The database is busy or out of reach; try again.", {"Retry-After": "1"})
    return await _on_bug(request, error)


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = [{"in": str(one["loc"][0]), "name": _name(one["loc"]), "reason": one["msg"]} for one in error.errors()]
    first = found[0]
    return answer(
        "bad-input", f"{first['in']} parameter {first['name']!r}: {first['reason']}; correct it.", errors=found
    )


def _name(place: tuple[Any, ...]) -> str:
    return ".".join(map(str, place[1:])) or str(place[0])


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    slug = _BY_STATUS.get(error.status_code, "bad-request" if error.status_code < 500 else "internal")
    path = ascii(request.url.path)
    details = {
        "missing": f"There is nothing at {path}; /v1/openapi.json has what there is.",
        "method-not-allowed": f"{request.method} is not done at {path}; /v1/openapi.json has what is.",
    }
    return answer(slug, details.get(slug, str(error.detail)), dict(error.headers or {}))


async def _on_bug(request: Request, error: Exception) -> JSONResponse:
    log.error("request failed", method=request.method, path=request.url.path, exc_info=error)
    return answer("internal", "The server failed; its log tells why. Nothing that was not confirmed is certain.")
