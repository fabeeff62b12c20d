"""What a page sends: a form whose token shows that a page of this server sent it."""

import hmac
import secrets
from collections.abc import Awaitable, Callable
from typing import Annotated
from urllib.parse import parse_qsl

from fastapi import Depends, Request
from starlette.responses import Response

from cluster.api.access import CSRF_HEADER, Caller, check_same_site, csrf_token, needs
from cluster.api.limits import check_text
from cluster.api.problems import Problem
from db.keys import Scope

MEDIA_TYPE = "application/x-www-form-urlencoded"
#: of who has not logged in yet
LOGIN_COOKIE = "shortstop_login"
_MOST_FIELDS = 20

Form = dict[str, str]


class Posted:
    """A form and who sent it."""

    def __init__(self, caller: Caller, form: Form) -> None:
        self.caller, self.form = caller, form

    def text(self, name: str) -> str:
        """A field, with line ends as everywhere else."""
        return self.form.get(name, "").replace("\r\n", "\n")


def posted(scope: Scope) -> Callable[[Request], Awaitable[Posted]]:
    """The dependency of what a form does: its fields, and who sent it and may."""

    async def read(request: Request) -> Posted:
        form = await read_form(request)
        return Posted(await needs(scope)(_with_token(request, form)), form)

    return read


Asked = Annotated[Posted, Depends(posted(Scope.QUERY))]
Changes = Annotated[Posted, Depends(posted(Scope.SUBMIT))]
Looks = Annotated[Posted, Depends(posted(Scope.READ))]


def _with_token(request: Request, form: Form) -> Request:
    """The request as a script would send it: a form can set no header, so that its field stands for it."""
    name = CSRF_HEADER.lower().encode()
    headers = [pair for pair in request.scope["headers"] if pair[0] != name]
    token = form.get("csrf", "").encode("ascii", "replace")
    return Request({**request.scope, "headers": [*headers, (name, token)]})


async def read_form(request: Request) -> Form:
    """The fields of a form. Raises `Problem`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != MEDIA_TYPE:
        raise Problem("wrong-media-type", f"The body is {kind or 'of no type'}; send {MEDIA_TYPE}.")
    try:
        body = (await request.body()).decode()
        fields = dict(parse_qsl(body, keep_blank_values=True, max_num_fields=_MOST_FIELDS, errors="strict"))
        for value in fields.values():
            check_text(value)
    except ValueError as error:
        raise Problem("bad-request", f"The form cannot be read ({error}); send it again.") from None
    return fields


def set_login_token(request: Request, response_of: Callable[[str], Response]) -> Response:
    """The page that asks for a key, made with the token of its form; the cookie that proves it goes along."""
    cookie = request.cookies.get(LOGIN_COOKIE) or secrets.token_urlsafe(32)
    response = response_of(csrf_token(cookie))
    secure = request.url.scheme == "https"
    response.set_cookie(LOGIN_COOKIE, cookie, httponly=True, samesite="strict", secure=secure, path="/login")
    return response


def check_login_token(request: Request, form: Form) -> None:
    """Raises `Problem` for a form that no page of this server sent."""
    check_same_site(request)
    cookie = request.cookies.get(LOGIN_COOKIE, "")
    if not cookie or not hmac.compare_digest(form.get("csrf", "").encode(), csrf_token(cookie).encode()):
        raise Problem("cross-site", "The form is not this server's, or its cookie is gone; open the page again.")
