"""The rooms of the API put together."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from typing import Any

import structlog
from anyio import to_thread
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.api import comparing, health, jobs, known, labels, questions, rows, schedules, sessions, uploads
from cluster.api.limits import Bounded, Rate, most_bytes
from cluster.api.problems import ProblemDetails, tell_problems
from cluster.api.state import THREADS, State
from cluster.api.watching import Hub
from cluster.metrics import Metrics
from cluster.pages.routes import router as pages
from cluster.schedules.spec import ScheduleSpec
from cluster.settings import Settings
from cluster.spec import JobSpec
from cluster.status import Watcher
from db.session import Database

log = structlog.get_logger()

#: of every answer; the report's page brings its own policy along
_HEADERS = [
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
]


class Login(BaseModel):
    """An API key."""

    key: str


def make_app(db: Database, settings: Settings, *, is_loopback: bool, with_pages: bool = True) -> FastAPI:
    """The API and the pages over an open record, which stays its owner's.

    is_loopback: whether it answers to this machine only.
    """
    hub = Hub(db)
    state = State(db, settings, is_loopback, hub, Rate(settings.requests_per_second), Metrics(db), Watcher(db))

    @asynccontextmanager
    async def live(app: FastAPI) -> AsyncIterator[None]:
        to_thread.current_default_thread_limiter().total_tokens = THREADS
        looking = asyncio.create_task(hub.run())
        yield
        hub.close()
        looking.cancel()
        with suppress(asyncio.CancelledError):
            await looking

    app = FastAPI(
        title="Shortstop",
        version=version("shortstop"),
        summary="Measures dynamic inference for code-completion models.",
        lifespan=live,
        openapi_url="/v1/openapi.json",
        redirect_slashes=False,
        docs_url=None,  # their pages come from a foreign network
        redoc_url=None,
        middleware=[Middleware(Logged), Middleware(Bounded, most=most_bytes(settings.upload_mb))],
    )
    app.state.shortstop = state
    tell_problems(app)
    for room in (jobs, comparing, schedules, rows, labels, questions, uploads, known, sessions, health):
        app.include_router(room.router)
    if with_pages:
        app.include_router(pages)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the bodies that are read by hand."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        parts = document.setdefault("components", {})
        schemas = parts.setdefault("schemas", {})
        models: tuple[type[BaseModel], ...] = (
            JobSpec,
            ScheduleSpec,
            questions.Question,
            comparing.Judged,
            labels.JudgedLabels,
            Login,
            ProblemDetails,
        )
        for model in models:
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= schema.pop("$defs", {}) | {model.__name__: schema}
        parts["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer", "description": "`shortstop key create` makes a key"}
        }
        for path, operations in document["paths"].items():
            for operation in operations.values():
                is_open = path in ("/healthz", "/readyz") or (path == "/v1/session" and "requestBody" in operation)
                operation["security"] = [] if is_open else [{"key": []}]
        app.openapi_schema = document
    return app.openapi_schema


class Logged:
    """ASGI: one line a request in the log, and what every answer says to browsers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                told = {name for name, _ in message.get("headers", [])}
                ours = [header for header in _HEADERS if header[0] not in told]
                message["headers"] = [*message.get("headers", []), *ours]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            took = round((time.perf_counter() - began) * 1000, 1)
            log.info("request", method=scope["method"], path=scope["path"], status=status, ms=took)
