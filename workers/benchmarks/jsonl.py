"""JSON lines with named fields.

Read line by line rather than through `datasets`: its JSON reader names a broken line by a byte offset of a block, and
turns a field that a line lacks into a silent null.
"""

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from engine.errors import BadInput
from workers.benchmarks.sample import Sample
from workers.benchmarks.spec import JsonlBenchmark

_NOT_STORABLE = re.compile("[\0\ud800-\udfff]")


def jsonl_samples(spec: JsonlBenchmark) -> list[Sample]:
    """A sample a line, blank lines passed over. Raises `BadInput` with file and line number."""
    samples = []
    first_use: dict[str, int] = {}
    for number, line in _numbered_lines(spec.jsonl):
        sample = _sample(spec, _Record(spec.jsonl, number, line))
        if sample.name in first_use:
            raise BadInput(
                f"{spec.jsonl}, line {number}: id {sample.name!r} is already that of line {first_use[sample.name]}; "
                "ids must differ."
            )
        first_use[sample.name] = number
        samples.append(sample)
    return samples


def _numbered_lines(name: str) -> Iterator[tuple[int, bytes]]:
    path = Path(os.path.expanduser(name))
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadInput(f"benchmark file {name!r} is not a whole gzip file ({error}); make it again.") from None
    except OSError as error:
        raise BadInput(f"benchmark file {name!r} cannot be read: {error.strerror}; correct the path.") from None


def _sample(spec: JsonlBenchmark, record: "_Record") -> Sample:
    name = record.label("id", spec.id) if spec.id else str(record.number)
    return Sample(
        name=name,
        prompt=record.text("prompt", spec.prompt, may_be_empty=False),
        reference=record.text("reference", spec.reference),
        language=spec.language,
        source_group=record.label("group", spec.group) if spec.group else name,
    )


class _Record:
    """One line of a file, and what is wrong with it."""

    def __init__(self, file: str, number: int, line: bytes) -> None:
        self.number = number
        self._where = f"{file}, line {number}"
        try:
            fields = json.loads(line.rstrip().decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise self._fault(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8.") from None
        except json.JSONDecodeError as error:
            raise self._fault(f"not JSON ({error.msg} at character {error.pos + 1}); correct or remove it.") from None
        except (ValueError, RecursionError) as error:
            raise self._fault(f"JSON beyond what Python reads ({error}); correct or remove it.") from None
        if not isinstance(fields, dict):
            raise self._fault(f"holds a {type(fields).__name__}, not an object; write one object a line.")
        self._fields: dict[str, Any] = fields

    def text(self, option: str, field: str, *, may_be_empty: bool = True) -> str:
        value = self._value(option, field)
        if not isinstance(value, str):
            raise self._fault(f"field {field!r} is a {type(value).__name__}, not text; correct it.")
        if not value and not may_be_empty:
            raise self._fault(f"field {field!r} is empty; a model needs something to go on.")
        return self._storable(field, value)

    def label(self, option: str, field: str) -> str:
        """Text, or a whole number as text."""
        value = self._value(option, field)
        if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
            raise self._fault(f"field {field!r} is {value!r}; an {option} is text or a whole number.")
        return self._storable(field, str(value))

    def _value(self, option: str, field: str) -> Any:
        if field in self._fields:
            return self._fields[field]
        near = get_close_matches(field, self._fields, n=1, cutoff=0.5)
        has = ", ".join(sorted(self._fields)) or "no fields"
        hint = f"did you mean {near[0]!r}?" if near else f"the line has {has}."
        raise self._fault(f"field {field!r} is missing; {hint} Name the right one with `{option}: …`.")

    def _storable(self, field: str, value: str) -> str:
        """No database text holds a null character or half a surrogate pair."""
        if _NOT_STORABLE.search(value):
            raise self._fault(f"field {field!r} holds a null character or a lone surrogate; remove it.")
        return value

    def _fault(self, sentence: str) -> BadInput:
        return BadInput(f"{self._where}: {sentence}")
