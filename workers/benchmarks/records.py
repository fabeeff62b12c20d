"""Records with named fields, wherever they come from, and the samples they hold."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from engine.errors import BadInput
from workers.benchmarks.sample import Sample
from workers.benchmarks.spec import RecordsBenchmark

_NOT_STORABLE = re.compile("[\0\ud800-\udfff]")


def samples_of(spec: RecordsBenchmark, records: Iterable["Record"]) -> list[Sample]:
    """A sample a record. Raises `BadInput` with the place of a record that lacks something or repeats an id."""
    samples = []
    first_use: dict[str, int] = {}
    for record in records:
        sample = sample_of(spec, record)
        if sample.name in first_use:
            raise record.fault(
                f"id {sample.name!r} is already that of {record.unit} {first_use[sample.name]}; ids must differ."
            )
        first_use[sample.name] = record.number
        samples.append(sample)
    return samples


def sample_of(spec: RecordsBenchmark, record: "Record") -> Sample:
    """The sample that a record holds. Raises `BadInput` with the record's place."""
    name = record.label("id", spec.id) if spec.id else str(record.number)
    return Sample(
        name=name,
        prompt=record.text("prompt", spec.prompt, may_be_empty=False),
        reference=record.text("reference", spec.reference),
        language=spec.language,
        source_group=record.label("group", spec.group) if spec.group else name,
    )


class Record:
    """One record, where it stands, and what is wrong with it."""

    def __init__(self, source: str, unit: str, number: int, fields: dict[str, Any]) -> None:
        """unit: what the source counts, from 1 on: lines, rows."""
        self.unit, self.number = unit, number
        self._where = f"{source}, {unit} {number}"
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

    def _value(self, option: str, field: str) -> Any:
        if field in self._fields:
            return self._fields[field]
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
        return BadInput(f"{self._where}: {sentence}")
