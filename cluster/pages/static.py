"""Scripts and styles: from the packages that bring them, under addresses that change with their content."""

import gzip
import hashlib
from functools import cache
from importlib.resources import files
from typing import Annotated

from fastapi import APIRouter, Header, Query
from starlette.responses import Response

from cluster.api.problems import Problem
from cluster.reports.page import asset, plotly

router = APIRouter(include_in_schema=False)

_REPORT = {"report.css": "page.css", "charts.js": "page.js", "replay.css": "replay.css", "replay.js": "replay.js"}
_OWN = ("pages.css", "live.js", "jobs.js", "job.js", "query.js", "submit.js", "system.js")
NAMES = ("plotly.js", *_REPORT, *_OWN)
_KINDS = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
_FOREVER = "public, max-age=31536000, immutable"


@cache
def text(name: str) -> str:
    """The content of one of `NAMES`."""
    if name == "plotly.js":
        return plotly()
    if name in _REPORT:
        return asset(_REPORT[name])
    return files("cluster.pages").joinpath("static", name).read_text(encoding="utf-8")


@cache
def _version(name: str) -> str:
    return hashlib.sha256(text(name).encode()).hexdigest()[:16]


@cache
def _packed(name: str) -> bytes:
    return gzip.compress(text(name).encode(), 6, mtime=0)


def url(name: str) -> str:
    """Where a page finds it."""
    return f"/static/{name}?v={_version(name)}"


def styles() -> list[str]:
    """What a page that is one file brings along."""
    return [text("report.css"), text("pages.css")]


def inline(*, with_charts: bool, kept: tuple[str, ...] = ()) -> dict[str, str]:
    """The scripts of a page that is one file, by name, in order. kept: those of the page that need no server."""
    return {name: text(name) for name in ((*(("plotly.js",) if with_charts else ()), "charts.js", *kept))}


@router.get("/static/{name}")
def static(
    name: str,
    v: Annotated[str | None, Query(max_length=64)] = None,
    accept_encoding: Annotated[str, Header()] = "",
) -> Response:
    """A script or a style, for everybody: there is nothing of the record in it."""
    if name not in NAMES:
        raise Problem("missing", f"There is no {name!a}; pages name those that there are.")
    headers = {"Cache-Control": _FOREVER if v == _version(name) else "no-store", "Vary": "Accept-Encoding"}
    kind = _KINDS[name.rpartition(".")[2]]
    if "gzip" in accept_encoding:
        return Response(_packed(name), headers=headers | {"Content-Encoding": "gzip"}, media_type=kind)
    return Response(text(name), headers=headers, media_type=kind)
