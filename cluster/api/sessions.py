"""Logging a browser in with a key: it keeps a cookie that no script can read, and tells a token with every change."""

from dataclasses import dataclass
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Request, Response

from cluster.api import examples
from cluster.api.access import COOKIE, Caller, authenticated, check_same_site, csrf_token, found_key
from cluster.api.jobs import Shared
from cluster.api.limits import read_json
from cluster.api.problems import described
from db import keys
from db.keys import SESSION_SECONDS, Scope
from engine.errors import BadInput

router = APIRouter(tags=["session"])


@dataclass(frozen=True)
class Session:
    """Who is asking, and what they may."""

    principal: str
    scopes: list[Scope]
    csrf_token: str | None  #: of a browser: what it sends as X-CSRF-Token with all that changes something


@router.post(
    "/v1/session",
    status_code=201,
    responses=described("too-large", "wrong-media-type"),
    openapi_extra=examples.body("Login", examples.LOGIN),
)
async def log_in(
    request: Request, response: Response, body: Annotated[Any, Depends(read_json)], state: Shared
) -> Session:
    """Log a browser in with an API key. The cookie goes with it to this server only, and ends after 12 hours."""
    check_same_site(request)
    key = body.get("key") if isinstance(body, dict) else None
    if not isinstance(key, str):
        raise BadInput("key: give an API key, as `shortstop key create` prints it.")
    row = await found_key(request, key)
    token = await to_thread.run_sync(keys.open_session, state.db, row)
    response.set_cookie(
        COOKIE,
        token,
        max_age=int(SESSION_SECONDS),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
        path="/",
    )
    return Session(row.name, list(row.scopes), csrf_token(token))


@router.get("/v1/session", responses=described())
async def who(caller: Annotated[Caller, Depends(authenticated)]) -> Session:
    """Who is asking: by key, by cookie, or because there is no key yet."""
    return Session(caller.name, sorted(caller.scopes), caller.session and csrf_token(caller.session))


@router.delete("/v1/session", status_code=204, responses=described())
async def log_out(response: Response, caller: Annotated[Caller, Depends(authenticated)], state: Shared) -> None:
    """Log the browser out."""
    if caller.session is not None:
        await to_thread.run_sync(keys.close_session, state.db, caller.session)
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
