"""`shortstop query`: SQL over the documented views, read-only by construction."""

import csv
import sys
from collections.abc import Iterator
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.options import DatabaseUrl
from cluster.cli.output import note, print_json, print_table, to_json
from cluster.cli.start import start

if TYPE_CHECKING:
    from db.queries import Result

#: rows that a table shows; csv and jsonl are streamed whole
TABLE_ROWS = 1000


class Format(StrEnum):
    """How an answer is written."""

    TABLE = "table"
    CSV = "csv"
    JSONL = "jsonl"


def query(
    sql: Annotated[str, typer.Argument(metavar="SQL", help="One SELECT; - reads standard input.")],
    form: Annotated[Format, typer.Option("--format", help="csv and jsonl are streamed.")] = Format.TABLE,
    database: DatabaseUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """Ask the record in SQL, read-only; docs/sql.md has the views."""
    from db.queries import query as ask

    text = sys.stdin.read() if sql == "-" else sql
    with ask(start(database).database_url, text) as answer:
        if as_json:
            print_json(list(_mappings(answer)))
        elif form is Format.JSONL:
            for row in _mappings(answer):
                print(to_json(row))
        elif form is Format.CSV:
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(answer.columns)
            writer.writerows(answer)
        else:
            _print_rows(answer)


def _mappings(answer: "Result") -> Iterator[dict[str, Any]]:
    return (dict(zip(answer.columns, row, strict=True)) for row in answer)


def _print_rows(answer: "Result") -> None:
    rows = iter(answer)
    print_table(answer.columns, islice(rows, TABLE_ROWS))
    if next(rows, None) is not None:
        note(f"only the first {TABLE_ROWS} rows are shown; --format csv or jsonl gives all.")
