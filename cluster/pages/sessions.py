"""Logging in with a key, and out."""

from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from cluster.api.access import COOKIE, found_key
from cluster.api.jobs import Shared
from cluster.api.problems import Problem
from cluster.pages.forms import Looks, check_login_token, read_form, set_login_token
from cluster.pages.showing import PageRoute, see_other, show
from db import keys
from db.keys import SESSION_SECONDS

router = APIRouter(include_in_schema=False, route_class=PageRoute)


@router.get("/login")
async def ask_for_key(request: Request, then: Annotated[str, Query(alias="next", max_length=2000)] = "/") -> Response:
    """The page that asks for a key."""
    return _page(request, then)


def _page(request: Request, then: str, complaint: str | None = None) -> Response:
    def response_of(token: str) -> Response:
        return show(
            request,
            None,
            "login.html.j2",
            status=200 if complaint is None else 401,
            save=False,
            token=token,
            then=_here(then),
            complaint=complaint,
        )

    return set_login_token(request, response_of)


@router.post("/login")
async def log_in(request: Request, state: Shared) -> Response:
    """Log in, and go on where one was."""
    form = await read_form(request)
    check_login_token(request, form)
    then = _here(form.get("next", "/"))
    try:
        row = await found_key(request, form.get("key", "").strip())
    except Problem as problem:
        if problem.slug != "unauthenticated":
            raise
        return _page(request, then, "This key lets nobody in: it is mistyped, revoked or expired.")
    token = await to_thread.run_sync(keys.open_session, state.db, row)
    response = see_other(then)
    secure = request.url.scheme == "https"
    response.set_cookie(
        COOKIE, token, max_age=int(SESSION_SECONDS), httponly=True, samesite="strict", secure=secure, path="/"
    )
    return response


@router.post("/logout")
async def log_out(posted: Looks, state: Shared) -> Response:
    """Log out; the cookie is worth nothing any more."""
    if posted.caller.session is not None:
        await to_thread.run_sync(keys.close_session, state.db, posted.caller.session)
    response = see_other("/login")
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    return response


def _here(path: str) -> str:
    """A page of this server, wherever it was said to go on."""
    is_here = path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable()
    return path if is_here and path.isascii() and "\\" not in path else "/"
