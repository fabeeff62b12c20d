"""Records with named fields, wherever they come from, and the samples they hold."""

import re
import string
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from functools import cache
from typing import Any

from engine.errors import BadInput
from workers.benchmarks.ends import cut
from workers.benchmarks.sample import Sample
from workers.benchmarks.spec import RecordsBenchmark

_NOT_STORABLE = re.compile("[\0\ud800-\udfff]")


class LeftOut(Exception):
    """Why a record makes no sample, while the rest of the benchmark counts."""


def samples_of(spec: RecordsBenchmark, records: Iterable["Record"]) -> tuple[list[Sample], list[str]]:
    """A sample a record, and a sentence for each record that is left out because its reference came out empty.

    Raises `BadInput` with the place of a record that lacks something or repeats an id.
    """
    left_out: list[str] = []

    def made() -> Iterator[tuple[Record, Sample]]:
        for record in records:
            try:
                yield record, sample_of(spec, record)
            except LeftOut as reason:
                left_out.append(f"{record.where}: {reason}; it is left out.")

    return unique(made()), left_out


def unique(samples: Iterable[tuple["Record", Sample]]) -> list[Sample]:
    """The samples. Raises `BadInput` with the place of the first record that repeats an id."""
    found = []
    first_use: dict[str, int] = {}
    for record, sample in samples:
        if sample.name in first_use:
            raise record.fault(
                f"id {sample.name!r} is already that of {record.unit} {first_use[sample.name]}; ids must differ."
            )
        first_use[sample.name] = record.number
        found.append(sample)
    return found


def sample_of(spec: RecordsBenchmark, record: "Record") -> Sample:
    """The sample that a record holds. Raises `BadInput` with the record's place, and `LeftOut`."""
    name = record.label("id", spec.id) if spec.id else str(record.number)
    prompt = record.text("prompt", spec.prompt, may_be_empty=False)
    reference = record.text("reference", spec.reference)
    ended = cut(prompt, reference, spec.ends, spec.language)
    if reference.strip() and not ended.strip():
        raise LeftOut(f"field {spec.reference!r} is empty up to the end of its {spec.ends}")
    return Sample(
        name=name,
        prompt=prompt,
        reference=ended,
        language=spec.language,
        source_group=record.label("group", spec.group) if spec.group else name,
        test=record.text("test", spec.test) if spec.test else None,
    )


class Record:
    """One record, where it stands, and what is wrong with it."""

    def __init__(self, source: str, unit: str, number: int, fields: dict[str, Any]) -> None:
        """unit: what the source counts, from 1 on: lines, rows."""
        self.unit, self.number = unit, number
        self.where = f"{source}, {unit} {number}"
        self._fields = fields

    def text(self, option: str, field: str, *, may_be_empty: bool = True) -> str:
        value = self._value(option, field)
        if not isinstance(value, str):
            raise self.fault(f"field {field!r} is a {type(value).__name__}, not text; correct it.")
        if not value and not may_be_empty:
            raise self.fault(f"field {field!r} is empty; a model needs something to go on.")
        return self._storable(field, value)

    def label(self, option: str, field: str) -> str:
        """Text, or a whole number as text."""
        value = self._value(option, field)
        if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
            raise self.fault(f"field {field!r} is {value!r}; an {option} is text or a whole number.")
        return self._storable(field, str(value))

    def filled(self, template: str) -> str:
        """The text with each `{field}` replaced by the record's: text, a whole number, or a list of lines.

        `number` is the place of the record, where it has no such field.
        """
        return "".join(
            literal if field is None else literal + self._written(field) for literal, field in _pieces(template)
        )

    def _written(self, field: str) -> str:
        value = self._value("fields", field)
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            value = "\n".join(value)
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise self.fault(f"field {field!r} is a {type(value).__name__}, not text or lines; correct it.")
        return self._storable(field, str(value))

    def _value(self, option: str, field: str) -> Any:
        if field in self._fields:
            return self._fields[field]
        if field == "number":
            return self.number
        near = get_close_matches(field, self._fields, n=1, cutoff=0.5)
        has = ", ".join(sorted(self._fields)) or "no fields"
        hint = f"did you mean {near[0]!r}?" if near else f"the {self.unit} has {has}."
        raise self.fault(f"field {field!r} is missing; {hint} Name the right one with `{option}: …`.")

    def _storable(self, field: str, value: str) -> str:
        """No database text holds a null character or half a surrogate pair."""
        if _NOT_STORABLE.search(value):
            raise self.fault(f"field {field!r} holds a null character or a lone surrogate; remove it.")
        return value

    def fault(self, sentence: str) -> BadInput:
        return BadInput(f"{self.where}: {sentence}")


@cache
def _pieces(template: str) -> tuple[tuple[str, str | None], ...]:
    """Of a template: text, and the field that stands behind it. Raises `BadInput`."""
    try:
        return tuple((literal, field) for literal, field, _, _ in string.Formatter().parse(template))
    except ValueError as error:
        raise BadInput(f"{template!r} is no text with {{field}} in it ({error}); double a brace that is one.") from None
