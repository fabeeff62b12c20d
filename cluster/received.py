"""What a server sends, read: the rows of a query, and events."""

import json
from collections.abc import Iterator
from typing import IO, Any


class Rows:
    """The rows of a query that a server answered."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.columns: list[str] = json.loads(file.readline())

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return (tuple(json.loads(line)) for line in self._file)

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def parsed(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """Server-sent events: `(event, data)`, and `("", None)` for a comment, which says that the line lives."""
    kind, data = "", ""
    for line in lines:
        if line.startswith(":"):
            yield "", None
        elif line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data = line.removeprefix("data: ")
        elif not line and data:
            yield kind, json.loads(data)
            kind, data = "", ""
