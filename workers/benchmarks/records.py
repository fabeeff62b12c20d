"""Records with named fields, wherever they come from, and the samples they hold."""

import re
import string
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from functools import cache
from itertools import islice
from typing import Any, Protocol

from engine.errors import BadInput
from workers.benchmarks.draw import ranked
from workers.benchmarks.ends import cut
from workers.benchmarks.sample import Sample
from workers.benchmarks.spec import RecordsBenchmark

_NOT_STORABLE = re.compile("[\0\ud800-\udfff]")


class LeftOut(Exception):
    """Why a record makes no sample, while the rest of the benchmark counts."""


class MissingField(LeftOut):
    """A record lacks a field: where it is the first, the field's name is wrong."""

    def __init__(self, sentence: str, remedy: str) -> None:
        super().__init__(sentence)
        self.remedy = remedy


class Records(Protocol):
    """Records that can be had by their places, without reading those between."""

    def __len__(self) -> int: ...

    def number(self, place: int) -> int:
        """By which the record counts, from 1 on."""

    def at(self, places: Iterable[int]) -> Iterator["Record"]: ...


class Sentences:
    """Why records were left out: the first ones in full, of the others how many they are."""

    MOST = 200

    def __init__(self) -> None:
        self._first: list[str] = []
        self._more = 0

    def add(self, record: "Record", reason: object) -> None:
        if len(self._first) < self.MOST:
            self._first.append(f"{record.where}: {reason}; it is left out.")
        else:
            self._more += 1

    def listed(self) -> list[str]:
        return [*self._first, *([f"{self._more:,} more are left out."] if self._more else [])]


def samples_of(spec: RecordsBenchmark, records: "Iterable[Record] | Records") -> tuple[list[Sample], list[str]]:
    """A sample a record, and a sentence for each record that is left out.

    Of records that have places only those are read which the spec asks for: where neither id nor group is a field, a
    record is drawn by its number. Raises `BadInput` where the spec names a field that records do not have, and where
    two different records have one id.
    """
    left_out = Sentences()

    def made(chosen: Iterable[Record]) -> list[Sample]:
        return unique(each(chosen, lambda record: [sample_of(spec, record)], left_out), left_out)

    if isinstance(records, Iterable):
        first, end = spec.records or (0, None)
        return made(islice(records, first, end)), left_out.listed()
    first, end = spec.records or (0, len(records))
    places = range(min(first, len(records)), min(end, len(records)))
    if spec.samples is None or spec.samples >= len(places) or spec.id is not None or spec.group is not None:
        return made(records.at(places)), left_out.listed()
    drawn = records.at(ranked(places, lambda place: str(records.number(place)), spec.samples, spec.seed))
    samples = each(drawn, lambda record: [sample_of(spec, record)], left_out)
    kept = [sample for _, sample in islice(samples, spec.samples)]
    return sorted(kept, key=lambda sample: int(sample.name)), left_out.listed()


def each(
    records: Iterable["Record"], make: Callable[["Record"], Iterable[Sample]], left_out: Sentences
) -> Iterator[tuple["Record", Sample]]:
    """The samples that `make` has of each record; those of which it has none are left out.

    Raises `BadInput` with the place of a record that lacks a field, where no record before it had it.
    """
    none_yet = True
    for record in records:
        try:
            for sample in make(record):
                yield record, sample
                none_yet = False
        except MissingField as reason:
            if none_yet:
                raise BadInput(f"{record.where}: {reason}; {reason.remedy}") from None
            left_out.add(record, reason)
        except LeftOut as reason:
            left_out.add(record, reason)


def unique(samples: Iterable[tuple["Record", Sample]], left_out: Sentences) -> list[Sample]:
    """The samples, each once. Raises `BadInput` with the place of a record that has the id of a different one."""
    found = []
    first_use: dict[str, tuple[int, Sample]] = {}
    for record, sample in samples:
        number, first = first_use.setdefault(sample.name, (record.number, sample))
        if first is sample:
            found.append(sample)
        elif first == sample:
            left_out.add(record, f"it repeats {record.unit} {number}, id {sample.name!r}")
        else:
            raise BadInput(
                f"{record.where}: id {sample.name!r} is already that of {record.unit} {number}, which holds something "
                "else; ids must differ."
            )
    return found


def sample_of(spec: RecordsBenchmark, record: "Record") -> Sample:
    """The sample that a record holds. Raises `LeftOut`.

    A reference may be empty where a test tells what is right, and where completions end as the model ends them: there
    it says that nothing is to be written.
    """
    name = record.label("id", spec.id) if spec.id else str(record.number)
    prompt = record.text("prompt", spec.prompt, may_be_empty=False)
    reference = record.text("reference", spec.reference)
    ended = cut(prompt, reference, spec.ends, spec.language)
    may_be_empty = spec.test is not None or spec.ends == "text"
    if not ended.strip() and (reference.strip() or not may_be_empty):
        end = f" up to the end of its {spec.ends}" if reference.strip() else ""
        raise LeftOut(f"field {spec.reference!r} is empty{end}")
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

    def __init__(self, source: str, unit: str, number: int, fields: dict[str, Any], fault: str | None = None) -> None:
        """unit: what the source counts, from 1 on: lines, rows. fault: why there are no fields to be had."""
        self.unit, self.number = unit, number
        self.where = f"{source}, {unit} {number}"
        self._fields, self._fault = fields, fault

    def text(self, option: str, field: str, *, may_be_empty: bool = True) -> str:
        value = self._value(option, field)
        if not isinstance(value, str):
            raise LeftOut(f"field {field!r} is a {type(value).__name__}, not text")
        if not value and not may_be_empty:
            raise LeftOut(f"field {field!r} is empty, and a model needs something to go on")
        return self._storable(field, value)

    def label(self, option: str, field: str) -> str:
        """Text, or a whole number as text."""
        value = self._value(option, field)
        if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
            raise LeftOut(f"field {field!r} is {value!r}, but an {option} is text or a whole number")
        return self._storable(field, str(value))

    def filled(self, template: str) -> str:
        """The text with each `{field}` replaced by the record's: text, a whole number, or a list of lines.

        `number` is the place of the record, where it has no such field.
        """
        return "".join(
            literal if field is None else literal + self._written(field) for literal, field in _pieces(template)
        )

    def strings(self) -> list[str]:
        """All texts in the record, those in lists and in records within it included. Raises `LeftOut`."""
        if self._fault is not None:
            raise LeftOut(self._fault)
        return list(_strings(self._fields))

    def _written(self, field: str) -> str:
        value = self._value("fields", field)
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            value = "\n".join(value)
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise LeftOut(f"field {field!r} is a {type(value).__name__}, not text or lines")
        return self._storable(field, str(value))

    def _value(self, option: str, field: str) -> Any:
        if self._fault is not None:
            raise LeftOut(self._fault)
        if field in self._fields:
            return self._fields[field]
        if field == "number":
            return self.number
        near = get_close_matches(field, self._fields, n=1, cutoff=0.5)
        has = ", ".join(sorted(self._fields)) or "no fields"
        hint = f"did you mean {near[0]!r}?" if near else f"the {self.unit} has {has}."
        raise MissingField(f"field {field!r} is missing", f"{hint} Name the right one with `{option}: …`.")

    def _storable(self, field: str, value: str) -> str:
        """No database text holds a null character or half a surrogate pair."""
        if _NOT_STORABLE.search(value):
            raise LeftOut(f"field {field!r} holds a null character or a lone surrogate")
        return value


@cache
def _pieces(template: str) -> tuple[tuple[str, str | None], ...]:
    """Of a template: text, and the field that stands behind it. Raises `BadInput`."""
    try:
        return tuple((literal, field) for literal, field, _, _ in string.Formatter().parse(template))
    except ValueError as error:
        raise BadInput(f"{template!r} is no text with {{field}} in it ({error}); double a brace that is one.") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)
