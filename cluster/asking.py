"""Requests to a server: answers that are typed, refusals in the server's words, tries where nothing is done twice."""

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, TypeVar

import httpx
from pydantic import TypeAdapter

from cluster.errors import NotAllowed, ServerError
from db.errors import BadInput, Conflict, Missing

T = TypeVar("T")

#: tries of a request that may be made again, and the longest pause between two
TRIES = 8
_LONGEST_PAUSE = 8.0
#: a read that takes longer is given up, a question or a report excepted
_TIMEOUT = httpx.Timeout(30.0, connect=5.0)
LONG = httpx.Timeout(300.0, connect=5.0)
_AGAIN = {429, 502, 503, 504}
#: of an answer that fits into memory
_IN_MEMORY = 1 << 20
_REFUSALS = {404: Missing, 409: Conflict, 413: BadInput, 415: BadInput, 421: BadInput, 422: BadInput, 400: BadInput}


class Busy(Exception):
    """The server did nothing, and may do it later."""


class Asking:
    """A server, and the API key with which it is asked."""

    def __init__(self, url: str, key: str | None = None, *, transport: httpx.BaseTransport | None = None) -> None:
        """Raises `BadInput` for what is no URL, and for a key that no server made."""
        if not _is_url(url):
            raise BadInput(f"server {url!r} is no URL; write it like https://shortstop.example.org.")
        if key and not (key.isascii() and key.isprintable()):  # not shown: it may be a key but for one character
            raise BadInput("key: it has characters that no API key has; give it as `shortstop key create` prints it.")
        headers = {"User-Agent": "shortstop"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._url = url.rstrip("/")
        self._http = httpx.Client(base_url=self._url, headers=headers, timeout=_TIMEOUT, transport=transport)

    def _typed(self, kind: type[T], method: str, path: str, **options: Any) -> T:
        return TypeAdapter(kind).validate_python(self._json(method, path, **options))

    def _json(self, method: str, path: str, *, again: bool = False, **options: Any) -> Any:
        def ask() -> Any:
            with self._answering(method, path, **options) as answer:
                content = answer.read()
                return json.loads(content) if content else None

        return self._tried(ask, again or method == "GET")

    def _received(self, method: str, path: str, **options: Any) -> IO[bytes]:
        """The whole body of an answer, in a file that is gone when it is closed."""

        def ask() -> IO[bytes]:
            file: IO[bytes] = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 - closed by who reads it
            try:
                with self._answering(method, path, timeout=LONG, **options) as answer:
                    for piece in answer.iter_bytes():
                        file.write(piece)
            except BaseException:
                file.close()
                raise
            file.seek(0)
            return file

        return self._tried(ask, again=True)

    def _tried(self, ask: Callable[[], T], again: bool) -> T:
        """What `ask` returns, which is called again where it was not done, and where it may be done twice."""
        for attempt in range(1, TRIES + 1):
            try:
                return ask()
            except (Busy, httpx.ConnectError) as error:  # it was not done, it was not sent
                failure: Exception = error
            except httpx.TransportError as error:
                if not again:
                    raise self._gone(error) from None
                failure = error
            if attempt < TRIES:
                pause(attempt)
        raise self._gone(failure) from None

    @contextmanager
    def _answering(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        """The answer to one request, its body unread."""
        with self._http.stream(method, path, **options) as answer:
            self._check(answer)
            yield answer

    def _check(self, answer: httpx.Response) -> None:
        """Raises what went wrong, in the server's words."""
        if answer.is_success:
            return
        answer.read()
        try:
            detail = str(answer.json()["detail"])
        except (ValueError, KeyError, TypeError):
            detail = f"server {self._url!r} answered {answer.status_code}; is it a Shortstop?"
        if answer.status_code in _AGAIN:
            raise Busy(detail)
        if answer.status_code in (401, 403):
            raise NotAllowed(f"server {self._url!r}: {detail}")
        if answer.status_code in _REFUSALS:
            raise _REFUSALS[answer.status_code](detail)
        raise ServerError(f"server {self._url!r}: {detail}")

    def _gone(self, error: Exception) -> ServerError:
        reason = str(error) or type(error).__name__
        return ServerError(f"server {self._url!r} does not serve ({reason}); see whether it runs, and try again.")


def _is_url(url: str) -> bool:
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    is_name = bool(parts.host) and "%" not in parts.host  # what cannot stand in a name is written so
    return parts.scheme in ("http", "https") and is_name and (parts.port or 0) < 65536


def pause(attempt: int) -> None:
    """Longer each time, and never in step with others."""
    time.sleep(min(0.1 * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1))
