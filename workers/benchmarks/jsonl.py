"""JSON lines with named fields.

Read line by line rather than through `datasets`, which serves in `dataset.py`: its JSON reader names a broken line by a
byte offset of a block, and turns a field that a line lacks into a silent null.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from engine.errors import BadInput
from workers.benchmarks.records import Record, samples_of
from workers.benchmarks.sample import Sample
from workers.benchmarks.spec import JsonlBenchmark


def jsonl_samples(spec: JsonlBenchmark) -> tuple[list[Sample], list[str]]:
    """A sample a line, blank lines passed over. Raises `BadInput` with file and line number."""
    return samples_of(spec, records_of(spec.jsonl))


def records_of(name: str) -> Iterator[Record]:
    """The records of a file, packed or not. Raises `BadInput` with file and line number."""
    return (_record(name, number, line) for number, line in _numbered_lines(name))


def _numbered_lines(name: str) -> Iterator[tuple[int, bytes]]:
    path = Path(os.path.expanduser(name))
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadInput(f"benchmark file {name!r} is not a whole gzip file ({error}); make it again.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"benchmark file {name!r} cannot be read: {reason}; correct the path.") from None


def _record(file: str, number: int, line: bytes) -> Record:
    record = Record(file, "line", number, {})
    try:
        fields = json.loads(line.rstrip().decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise record.fault(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise record.fault(f"not JSON ({error.msg} at character {error.pos + 1}); correct or remove it.") from None
    except (ValueError, RecursionError) as error:
        raise record.fault(f"JSON beyond what Python reads ({error}); correct or remove it.") from None
    if not isinstance(fields, dict):
        raise record.fault(f"holds a {type(fields).__name__}, not an object; write one object a line.")
    return Record(file, "line", number, fields)
