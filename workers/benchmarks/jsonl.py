"""JSON lines with named fields.

Read line by line rather than through `datasets`, which serves in `dataset.py`: its JSON reader names a broken line by a
byte offset of a block, turns a field that a line lacks into a silent null, and copies the file before the first record.
Of a plain file an index of its lines is kept, so that some of them are there at once, whatever its size.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from engine.errors import BadInput
from workers.benchmarks.line_index import LineIndex
from workers.benchmarks.records import Record, samples_of
from workers.benchmarks.sample import Sample
from workers.benchmarks.spec import JsonlBenchmark

#: of one line in bytes; what is longer is no prompt with its reference
LONGEST_LINE = 8 << 20


def jsonl_samples(spec: JsonlBenchmark) -> tuple[list[Sample], list[str]]:
    """A sample a line, blank lines passed over, and a sentence for each line that is left out. Raises `BadInput`."""
    path = Path(os.path.expanduser(spec.jsonl))
    by_number = spec.samples is not None and spec.id is None and spec.group is None
    if path.suffix == ".gz" or not (by_number or spec.records):
        return samples_of(spec, records_of(spec.jsonl))
    with _opened(spec.jsonl) as file:
        return samples_of(spec, JsonLines(spec.jsonl, file))


def records_of(name: str) -> Iterator[Record]:
    """The records of a file, packed or not, one after the other. Raises `BadInput`."""
    with _opened(name) as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if line.strip():
                yield _record(name, number, line)
            while len(line) > LONGEST_LINE and not line.endswith(b"\n"):  # the rest of a line that is too long
                line = file.readline(LONGEST_LINE + 1)


class JsonLines:
    """The records of a plain file by their places, read when they are asked for."""

    def __init__(self, name: str, file: IO[bytes]) -> None:
        self._name, self._file = name, file
        self._index = LineIndex.of(file)

    def __len__(self) -> int:
        return len(self._index)

    def number(self, place: int) -> int:
        """Of the line that a record stands in, from 1 on."""
        return self._index.number(place)

    def at(self, places: Iterable[int]) -> Iterator[Record]:
        """The records at some places, counted from 0."""
        for place in places:
            self._file.seek(self._index.offset(place))
            yield _record(self._name, self.number(place), self._file.readline(LONGEST_LINE + 1))


@contextmanager
def _opened(name: str) -> Iterator[IO[bytes]]:
    path = Path(os.path.expanduser(name))
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadInput(f"benchmark file {name!r} is not a whole gzip file ({error}); make it again.") from None
    except BadInput:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"benchmark file {name!r} cannot be read: {reason}; correct the path.") from None


def _record(file: str, number: int, line: bytes) -> Record:
    """A line that holds none is a record without fields, which says so when it is asked for them."""
    fields: dict[str, Any] = {}
    fault = None
    try:
        if len(line) > LONGEST_LINE:
            fault = f"has more than {LONGEST_LINE:,} bytes"
        else:
            fields = json.loads(line.rstrip().decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        fault = f"byte {error.start + 1} is not UTF-8"
    except json.JSONDecodeError as error:
        fault = f"not JSON ({error.msg} at character {error.pos + 1})"
    except (ValueError, RecursionError) as error:
        fault = f"JSON beyond what Python reads ({error})"
    if fault is None and not isinstance(fields, dict):
        fault = f"holds a {type(fields).__name__}, not an object"
    return Record(file, "line", number, {} if fault else fields, fault)
