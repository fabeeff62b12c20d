"""SQL over HTTP: the questions of `shortstop query`, read-only, each within its time and its size.

An answer is written aside before a byte of it is sent: a question that fails ends with a problem and not in the middle
of a stream, and a client that reads slowly holds nothing of the database.
"""

import csv
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import IO, Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Depends
from pydantic import Field, ValidationError
from starlette.responses import Response, StreamingResponse

from cluster.api import examples
from cluster.api.access import Questioner
from cluster.api.jobs import Shared
from cluster.api.limits import read_json
from cluster.api.problems import described, streams
from db.queries import Result, query
from engine.errors import BadInput
from engine.spec import Spec, first_complaint

router = APIRouter(tags=["query"])

#: rows of an answer that comes as one JSON document
PAGE = 10_000
#: bytes of any answer
LARGEST = 1 << 30
MEDIA_TYPES = {
    "json": "application/json",
    "ndjson": "application/x-ndjson",
    "arrays": "application/x-ndjson",
    "csv": "text/csv",
}
_IN_MEMORY = 1 << 20


class Question(Spec):
    """One SELECT over the documented views (docs/sql.md)."""

    sql: str = Field(min_length=1, max_length=100_000)
    timeout_s: float = Field(30, ge=0.001, le=60)
    limit: int | None = Field(None, ge=1, le=2**31 - 1, description=f"rows; of json {PAGE} at most")
    format: Literal["json", "ndjson", "arrays", "csv"] = Field(
        "json", description="json: columns, rows; ndjson: an object a row; arrays: the columns, then a row, a line each"
    )


@dataclass(frozen=True)
class Answered:
    """An answer as one document."""

    columns: list[str]
    rows: list[list[Any]]
    more: bool  #: whether there are rows beyond these


_STREAMS = streams("application/x-ndjson", "text/csv")


async def _question(body: Annotated[Any, Depends(read_json)]) -> Question:
    try:
        return Question.model_validate(body)
    except ValidationError as error:
        raise BadInput(f"query: {first_complaint(error)}") from None


@router.post(
    "/v1/query",
    response_model=Answered,
    responses=described("too-large", "wrong-media-type") | _STREAMS,
    openapi_extra=examples.body("Question", examples.QUESTION),
)
async def ask(caller: Questioner, question: Annotated[Question, Depends(_question)], state: Shared) -> Response:
    """Ask the record in SQL: one SELECT over the documented views, read-only by construction."""
    limit = min(question.limit or PAGE, PAGE) + 1 if question.format == "json" else question.limit
    file = await to_thread.run_sync(
        partial(_written, lambda: query(state.db, question.sql, timeout_s=question.timeout_s, limit=limit), question),
        limiter=state.questions,
    )
    return StreamingResponse(_pieces(file), media_type=MEDIA_TYPES[question.format])


def _written(answer: Callable[[], Result], question: Question) -> IO[bytes]:
    """The whole answer in a file that is gone when it is closed."""
    file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - closed by who reads it
    try:
        with answer() as rows:
            for piece in _WRITERS[question.format](rows, question):
                file.write(piece.encode())
                if file.tell() > LARGEST:
                    raise BadInput(f"the answer has more than {LARGEST:,} bytes; narrow the query.")
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while piece := file.read(1 << 16):
            yield piece


def _json(rows: Result, question: Question) -> Iterator[str]:
    most = min(question.limit or PAGE, PAGE)
    found = [list(row) for row in rows]
    yield _text({"columns": rows.columns, "rows": found[:most], "more": len(found) > most})


def _ndjson(rows: Result, question: Question) -> Iterator[str]:
    for row in rows:
        yield _text(dict(zip(rows.columns, row, strict=True))) + "\n"


def _arrays(rows: Result, question: Question) -> Iterator[str]:
    yield _text(rows.columns) + "\n"
    for row in rows:
        yield _text(row) + "\n"


def _csv(rows: Result, question: Question) -> Iterator[str]:
    for row in _and_columns(rows):
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerow(row)
        yield out.getvalue()


def _and_columns(rows: Result) -> Iterator[Any]:
    yield rows.columns
    yield from rows


def _text(value: Any) -> str:
    with suppress(ValueError):
        return json.dumps(value, ensure_ascii=True, default=str, allow_nan=False)
    return json.dumps(_finite(value), default=str)


def _finite(value: Any) -> Any:
    """NaN and infinities are no JSON: null."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


_WRITERS: dict[str, Callable[[Result, Question], Iterator[str]]] = {
    "json": _json,
    "ndjson": _ndjson,
    "arrays": _arrays,
    "csv": _csv,
}
