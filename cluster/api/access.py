"""Who asks, and what they may. Every operation but the probes names the scope that it needs.

A client brings its key as `Authorization: Bearer`; a browser that logged in brings a cookie, and for all that changes
something a CSRF token as well. A server on a loopback address lets everybody of the machine in while there is no key:
then only under a loopback name and never from another site, so that no page in a browser speaks for its user.
"""

import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Annotated, NoReturn

from anyio import to_thread
from fastapi import Depends, Request

from cluster.api.problems import Problem
from db import keys
from db.events import LOCAL
from db.keys import KeyRow, Scope

if TYPE_CHECKING:
    from cluster.api.state import State

COOKIE = "shortstop_session"
CSRF_HEADER = "X-CSRF-Token"
#: what a proxy adds, which stands on this machine and speaks for others
_OF_PROXIES = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
_SAFE = {"GET", "HEAD", "OPTIONS"}


@dataclass(frozen=True)
class Caller:
    """Who asks."""

    name: str  #: the principal of what they do
    scopes: frozenset[Scope]
    key_id: str | None = None  #: None: somebody on this machine, and there is no key
    session: str | None = None  #: of a browser: its token

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes

    def check_owns(self, principal: str, job_id: int) -> None:
        """Raises `Problem` for a job of somebody else, unless the caller looks after all of them."""
        if principal != self.name and not self.may(Scope.ADMIN):
            raise Problem("forbidden", f"Job {job_id} is {principal!r}'s; take their key, or one with scope admin.")


def needs(scope: Scope) -> Callable[[Request], Awaitable[Caller]]:
    """The dependency of an operation: who asks for it, and may."""

    async def allowed(request: Request) -> Caller:
        caller = await authenticated(request)
        if not caller.may(scope):
            raise Problem("forbidden", f"This needs scope {scope.value}, and key {caller.key_id} has none of it.")
        return caller

    return allowed


Reader = Annotated[Caller, Depends(needs(Scope.READ))]
Submitter = Annotated[Caller, Depends(needs(Scope.SUBMIT))]
Questioner = Annotated[Caller, Depends(needs(Scope.QUERY))]


async def authenticated(request: Request) -> Caller:
    """Who asks. Raises `Problem` for nobody known, and for who asks too much."""
    state: State = request.app.state.shortstop
    written = request.headers.get("authorization")
    token = request.cookies.get(COOKIE)
    if written is not None:
        kind, _, key = written.partition(" ")
        row = await found_key(request, key.strip() if kind.lower() == "bearer" else "")
        state.rate.take(row.id)
        return Caller(row.name, frozenset(row.scopes), row.id)
    if token is not None:
        logged_in = await to_thread.run_sync(keys.find_session, state.db, token)
        row = logged_in or _stranger(request)
        state.rate.take(row.id)
        check_same_site(request)
        if request.method not in _SAFE and not _equal(request.headers.get(CSRF_HEADER, ""), csrf_token(token)):
            raise Problem("cross-site", f"The header {CSRF_HEADER} is not this session's; GET /v1/session tells it.")
        return Caller(row.name, frozenset(row.scopes), row.id, token)
    if not state.is_loopback or await to_thread.run_sync(keys.any_key, state.db):
        raise _nobody()
    _check_on_this_machine(request)
    state.rate.take(LOCAL)
    return Caller(LOCAL, frozenset(Scope))


async def still_valid(request: Request, caller: Caller) -> bool:
    """Whether a caller whose request goes on for long may still be served."""
    try:
        again = await authenticated(request)
    except Problem as problem:
        return problem.slug == "too-many-requests"
    return again.key_id == caller.key_id


async def found_key(request: Request, key: str) -> KeyRow:
    """The row of a key that lets its owner in. Raises `Problem`."""
    state: State = request.app.state.shortstop
    row = await to_thread.run_sync(keys.find_key, state.db, key)
    return row or _stranger(request)


def _stranger(request: Request) -> NoReturn:
    state: State = request.app.state.shortstop
    state.strangers.take(request.client.host if request.client else "")
    raise _nobody()


def _nobody() -> Problem:
    return Problem(
        "unauthenticated",
        "No valid API key came with the request; send `Authorization: Bearer KEY` (`shortstop key create` makes one).",
        headers={"WWW-Authenticate": 'Bearer realm="shortstop"'},
    )


def csrf_token(session: str) -> str:
    """What a page of ours knows and no other: made of the cookie, which scripts cannot read."""
    return hashlib.sha256(f"csrf {session}".encode()).hexdigest()


def _equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())


def check_same_site(request: Request) -> None:
    """Of what a browser sends along by itself. Raises `Problem`."""
    origin = request.headers.get("origin")
    if request.method not in _SAFE and origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        raise Problem("cross-site", f"The request comes from {origin!a}; only pages of this server may send it.")
    if request.headers.get("sec-fetch-site") in ("cross-site", "same-site") and request.method not in _SAFE:
        raise Problem("cross-site", "The request comes from another site; only pages of this server may send it.")


def _check_on_this_machine(request: Request) -> None:
    """Raises `Problem` where a browser was led here under another name or by another site, or a proxy stands there."""
    if any(name in request.headers for name in _OF_PROXIES):
        raise Problem(
            "misdirected",
            "Without keys this server answers to this machine only, and the request came through a proxy; make a key "
            "with `shortstop key create`.",
        )
    host = request.headers.get("host", "")
    if not is_loopback(re.sub(r":\d*$", "", host)):
        raise Problem("misdirected", f"Without keys this server answers to localhost only, not to {host!a}.")
    check_same_site(request)
    if request.headers.get("sec-fetch-site") == "cross-site" and request.headers.get("sec-fetch-mode") != "navigate":
        raise Problem("cross-site", "The request comes from another site; only pages of this server may send it.")


def is_loopback(host: str) -> bool:
    """Whether a name or an address can only mean this machine."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
