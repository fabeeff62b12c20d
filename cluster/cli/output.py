"""What commands write: answers to standard output, everything else to standard error."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

#: more than any row needs: where the output is piped, a row stays one line
PIPED_WIDTH = 100_000


def note(line: str) -> None:
    """A line beside the answer, to standard error."""
    print(line, file=sys.stderr, flush=True)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON of what a command answers: dataclasses and decimals included; what JSON has no form for becomes text."""
    return json.dumps(value, indent=indent, ensure_ascii=False, default=_plain)


def print_json(value: Any) -> None:
    """Print an answer as one JSON document."""
    print(to_json(value, indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """An aligned table: folded to the width of a terminal, whole lines where the output is piped."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, pad_edge=False, header_style="bold", show_header=any(columns))
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell), overflow="fold") for cell in row))
    console = Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
        console.width = max(console.measure(table).maximum, 1)
    console.print(table)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)
