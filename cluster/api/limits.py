"""How much one may ask: the size of a body, the requests of a key, the strings of a JSON document."""

import json
import math
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.api.problems import Problem, answer

#: of every body but an upload's and a judge's
JSON_BYTES = 1 << 20
#: of what a judge said: about two hundred thousand labels
LABEL_BYTES = 16 << 20
_LABELS = re.compile("/v1/jobs/[0-9]+/labels")
#: callers that a rate limiter remembers; the one that was silent longest is forgotten
_REMEMBERED = 10_000
_DEEPEST = 64


def most_bytes(upload_mb: int) -> Callable[[str], int]:
    """How large a body may be, by path."""

    def most(path: str) -> int:
        if path == "/v1/uploads":
            return upload_mb << 20
        return LABEL_BYTES if _LABELS.fullmatch(path) else JSON_BYTES

    return most


class Bounded:
    """ASGI: ends a request whose body is larger than `most(path)` bytes, whether its length was told or not."""

    def __init__(self, app: ASGIApp, most: Callable[[str], int]) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most, seen, has_begun = self._most(scope["path"]), 0, False
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if not told.isdigit() or int(told[:19]) > most:
            await _too_large(most)(scope, receive, send)
            return

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise _TooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, bounded, noted)
        except _TooLarge:
            if has_begun:
                raise
            await _too_large(most)(scope, receive, send)


class _TooLarge(Exception):
    pass


def _too_large(most: int) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    detail = f"The body may have {most:,} bytes at most; send less."
    return answer("too-large", detail, {"Connection": "close"})


class Rate:
    """A token bucket for each caller: so many requests a second on the long run, twice as many at once."""

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._most, self._clock = per_second, max(2 * per_second, 1.0), clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str) -> None:
        """Raises `Problem` where the caller has none left."""
        now = self._clock()
        left, at = self._left.pop(caller, (self._most, now))
        left = min(self._most, left + (now - at) * self._rate)
        self._left[caller] = (max(left - 1, 0.0) if left >= 1 else left, now)
        if len(self._left) > _REMEMBERED:
            self._left.popitem(last=False)
        if left < 1:
            wait = str(max(1, math.ceil((1 - left) / self._rate)))
            raise Problem(
                "too-many-requests",
                f"More than {self._rate:g} requests a second; wait {wait} s.",
                headers={"Retry-After": wait},
            )


def check_type(request: Request, wanted: str) -> None:
    """Raises `Problem` where the body is something else."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != wanted:
        told = ascii(kind)[:60] if kind else "of no type"
        raise Problem("wrong-media-type", f"The body is {told}; send {wanted}.")


async def read_json(request: Request) -> Any:
    """The body as JSON that both databases can keep: no NUL, no half characters, no numbers beyond 64 bits."""
    check_type(request, "application/json")
    try:
        value = json.loads(await request.body(), parse_constant=_refuse)
        check_json(value)
    except RecursionError:
        raise Problem("bad-request", f"The JSON is nested deeper than {_DEEPEST} levels; make it flat.") from None
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise Problem("bad-request", f"The body is not JSON that can be kept ({reason}); correct it.") from None
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def check_json(value: Any, depth: int = 0) -> None:
    """Raises `ValueError` or `RecursionError` for what databases cannot keep."""
    if depth > _DEEPEST:
        raise RecursionError
    if isinstance(value, str):
        check_text(value)
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ValueError("a number is beyond 64 bits")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is beyond what a float holds")
    elif isinstance(value, list | dict):
        for part in value.items() if isinstance(value, dict) else value:
            for one in part if isinstance(value, dict) else (part,):
                check_json(one, depth + 1)


def check_text(value: str) -> None:
    """Raises `ValueError` for what is no text in a database."""
    if "\0" in value:
        raise ValueError("a string holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("a string holds half of a surrogate pair") from None
