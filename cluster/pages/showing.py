"""From a template to an answer: a page of the server, or the same page as one file that needs nothing else.

Every text is escaped by the templates. A page of the server runs the server's own scripts and no other, and asks
nobody else; a file runs the scripts that stand in it, known by their hashes.
"""

import json
from collections.abc import Callable, Coroutine
from functools import cache
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from fastapi import Request
from fastapi.routing import APIRoute
from jinja2 import ChoiceLoader, Environment, PackageLoader
from markupsafe import Markup
from starlette.datastructures import URL
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from cluster.api.access import Caller, csrf_token
from cluster.pages import static
from cluster.reports.figures import Figure
from cluster.reports.page import content_security_policy, environment, json_block, ramp

#: a page's own policy; plotly places its elements by inline styles, and so do the bars under tokens
POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; script-src 'self'; "
    "style-src 'self' 'unsafe-inline'; img-src data:; connect-src 'self'"
)


@cache
def _environment() -> Environment:
    made = environment(ChoiceLoader([PackageLoader("cluster.pages"), PackageLoader("cluster.reports")]))
    made.filters["fromjson"] = json.loads
    made.globals |= {"static": static.url, "quote": lambda value: quote(str(value), safe="")}
    return made


def show(
    request: Request,
    caller: Caller | None,
    template: str,
    *,
    status: int = 200,
    charts: dict[str, Figure] | None = None,
    layers: list[int] | None = None,
    scripts: tuple[str, ...] = (),
    kept: tuple[str, ...] = (),
    sheets: tuple[str, ...] = (),
    save: bool | None = None,
    **context: Any,
) -> Response:
    """A page. charts: figures by name; None: the page has none. layers: the exit layers that have colours.

    scripts: those of the page, beside what all have; kept: more of them, which need no server. sheets: styles of its
    own. save: whether the page is wanted as a file; as the address says
    when absent. A file has no scripts but those of charts and tokens, and what is kept: there is nobody to ask.
    """
    save = request.query_params.get("save") == "file" if save is None else save
    inline = static.inline(with_charts=charts is not None, kept=kept) if save else {}
    policy = content_security_policy(list(inline.values())) if save else POLICY
    session = caller.session if caller is not None else None
    page = (
        _environment()
        .get_template(template)
        .render(
            caller=caller,
            csrf=csrf_token(session) if session else "",
            path=request.url.path,
            save=save,
            save_url=_save_url(request),
            policy=policy,
            layers=layers or [],
            ramp=ramp(layers or []),
            charts=None if charts is None else Markup(json_block(charts)),
            styles=[Markup(style) for style in (*static.styles(), *map(static.text, sheets))] if save else [],
            sheets=sheets,
            inline=[Markup(script) for script in inline.values()],
            scripts=(*scripts, *kept),
            **context,
        )
    )
    # with the API's `no-referrer` a browser would send forms from nowhere (`Origin: null`)
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "same-origin"}
    if save:
        name = "-".join(part for part in PurePath(request.url.path).parts if part != "/") or "jobs"
        headers["Content-Disposition"] = f'attachment; filename="shortstop-{_plain(name)}.html"'
    return HTMLResponse(page, status, headers)


def _save_url(request: Request) -> str:
    """The page's address as a file."""
    url: URL = request.url.include_query_params(save="file")
    return f"{url.path}?{url.query}"


def _plain(name: str) -> str:
    return "".join(char if char.isalnum() and char.isascii() else "-" for char in name)


def see_other(path: str) -> Response:
    """Go on at another page of this server."""
    return RedirectResponse(path, 303)


class PageRoute(APIRoute):
    """What goes wrong comes out as a page; who is not known is asked to log in."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def told(request: Request) -> Response:
            try:
                return await answer(request)
            except Exception as error:
                problem = await _problem(request, error)
            if problem.status_code == 401 and request.method == "GET":
                here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
                return see_other(f"/login?next={quote(here, safe='')}")
            return _problem_page(request, problem)

        return told


async def _problem(request: Request, error: Exception) -> JSONResponse:
    """What the API would answer. Raises the error where it is none of those that the API has words for."""
    handlers = request.app.exception_handlers
    handler = next((handlers[kind] for kind in type(error).__mro__ if kind in handlers and kind is not Exception), None)
    if handler is None:
        raise error
    answered: JSONResponse = await handler(request, error)
    return answered


def _problem_page(request: Request, problem: JSONResponse) -> Response:
    told = json.loads(bytes(problem.body))
    page = show(request, None, "problem.html.j2", status=problem.status_code, save=False, problem=told)
    if "retry-after" in problem.headers:
        page.headers["retry-after"] = problem.headers["retry-after"]
    return page
