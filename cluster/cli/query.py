"""`shortstop query`: SQL over the documented views, read-only by construction."""

import csv
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from cluster.cli.options import DatabaseUrl, ServerUrl
from cluster.cli.output import note, print_table, to_json
from cluster.cli.start import service, writable
from engine.errors import BadInput

if TYPE_CHECKING:
    from cluster.service import Answer

#: rows that a table shows; all other formats are streamed whole
TABLE_ROWS = 1000


class Format(StrEnum):
    """How an answer is written."""

    TABLE = "table"
    CSV = "csv"
    JSONL = "jsonl"
    JSON = "json"
    PARQUET = "parquet"


def query(
    sql: Annotated[str, typer.Argument(metavar="SQL", help="One SELECT; - reads standard input.")],
    form: Annotated[
        Format, typer.Option("--format", help="All but table are streamed; parquet needs --output.")
    ] = Format.TABLE,
    output: Annotated[str | None, typer.Option("--output", metavar="FILE", help="Write the answer here.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="End after so many rows.")] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0.001, help="End a query that takes longer.")
    ] = 30,
    database: DatabaseUrl = None,
    server: ServerUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array: --format json.")] = False,
) -> None:
    """Ask the record in SQL, read-only; docs/sql.md has the views."""
    form = Format.JSON if as_json else form
    if form is Format.PARQUET and output is None:
        raise BadInput("format parquet is no text; name a file with --output.")
    if form is Format.TABLE and output is not None:
        raise BadInput(f"output {output!r}: a table is for the screen; choose --format csv, jsonl, json or parquet.")
    file = writable(output)
    text = sys.stdin.read() if sql == "-" else sql
    most = TABLE_ROWS + 1 if form is Format.TABLE and limit is None else limit
    with (
        service(database, server=server) as shortstop,
        shortstop.query(text, timeout_s=timeout, limit=most) as answer,
    ):
        if file is None:
            _write(answer, form, sys.stdout)
            return
        with _whole(file) as partial:
            if form is Format.PARQUET:
                from cluster.parquet import write_parquet

                write_parquet(partial, answer.columns, answer)
            else:
                with partial.open("w", encoding="utf-8", newline="") as stream:
                    _write(answer, form, stream)


@contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """A file beside the one that is wanted, which it becomes at the end: an answer that breaks off leaves nothing."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _write(answer: "Answer", form: Format, stream: TextIO) -> None:
    if form is Format.TABLE:
        _print_rows(answer)
    elif form is Format.CSV:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(answer.columns)
        writer.writerows(answer)
    elif form is Format.JSONL:
        for row in _mappings(answer):
            print(to_json(row), file=stream)
    else:
        before = "[\n  "
        for row in _mappings(answer):
            print(before, to_json(row), sep="", end="", file=stream)
            before = ",\n  "
        print("[]" if before.startswith("[") else "\n]", file=stream)


def _mappings(answer: "Answer") -> Iterator[dict[str, Any]]:
    return (dict(zip(answer.columns, row, strict=True)) for row in answer)


def _print_rows(answer: "Answer") -> None:
    rows = iter(answer)
    print_table(answer.columns, islice(rows, TABLE_ROWS))
    if next(rows, None) is not None:
        note(f"only the first {TABLE_ROWS} rows are shown; --format csv or jsonl gives all.")
