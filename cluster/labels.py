"""Labels on their way to judges and back: blinded, once a text, in a seeded order; taken in whole or not at all."""

import csv
import hashlib
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from db import labels
from db.events import LOCAL
from db.labels import Label, Offered, SamplePlace, hash_of
from db.queue import storable
from db.session import Database
from engine.errors import BadInput

Form = Literal["csv", "jsonl"]

#: what a judge is shown, and at the end what the judge fills in
COLUMNS = ("id", "language", "prompt", "completion", "accepted")
_HASH_DIGITS = 16
_SAID: dict[Any, bool] = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
#: of a judge's name, in characters
LONGEST_NAME = 100


@dataclass(frozen=True)
class Item:
    """One text to judge. Nothing of it tells which policies wrote it."""

    id: str
    language: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Judgement:
    """What a judge said of an item."""

    id: str
    accepted: bool
    line: int | None = None  #: where it was written, from 1 on


@dataclass(frozen=True)
class LabelsImported:
    """What became of a judge's labels."""

    job: int
    judge: str
    new: int
    changed: int  #: the judge had said otherwise before
    unchanged: int


def items(db: Database, job_id: int, *, samples: int | None = None, seed: int = 0) -> Iterator[Item]:
    """What there is to judge of a job that has ended: each text once, the texts of a sample behind one another.

    samples: so many of the job, the first in the seed's order: fewer are always a part of more. Raises `Missing`,
    `Conflict`.
    """
    places = sorted(labels.samples_of_job(db, job_id), key=lambda place: _drawn(seed, place))[:samples]
    texts = labels.offered(db, job_id, [place.sample_id for place in places])
    for _, group in groupby(texts, key=lambda one: one.sample_id):
        for one in sorted(group, key=lambda one: _digest(f"{seed} {one.text}")):
            yield Item(_id(job_id, one), one.language, one.prompt, one.text)


def import_labels(
    db: Database, job_id: int, judge: str, judgements: Sequence[Judgement], *, who: str = LOCAL
) -> LabelsImported:
    """Take in what a judge said of a job's items; the same again changes nothing. Raises `BadInput`, `Missing`."""
    name = checked_judge(judge)
    _check_once(judgements)
    samples = {_parsed(one, job_id) for one in judgements}
    known = {_id(job_id, one): one for one in labels.offered(db, job_id, sorted(samples))}
    for one in judgements:
        if one.id not in known:
            raise BadInput(
                f"{_where(one)}id {one.id!r} is not of job {job_id}; `shortstop label export {job_id}` gives those "
                "that are."
            )
    asked = [Label(known[one.id].sample_id, known[one.id].text, one.accepted) for one in judgements]
    kept = labels.keep_labels(db, job_id, name, asked, who=who)
    return LabelsImported(job_id, name, kept.new, kept.changed, kept.unchanged)


def checked_judge(judge: str) -> str:
    """The name without white space around it. Raises `BadInput`."""
    name = judge.strip()
    if not name or len(name) > LONGEST_NAME or not name.isprintable() or storable(name) != name:
        raise BadInput(
            f"judge {judge[:40]!r} is no name; give 1 to {LONGEST_NAME} printable characters, such as --judge anna."
        )
    return name


def job_of(judgements: Sequence[Judgement]) -> int:
    """The job whose items were judged. Raises `BadInput` where there are none, or those of several jobs."""
    if not judgements:
        raise BadInput("labels: nothing is judged yet; fill the column `accepted` with 1 or 0.")
    jobs = {one.id.split(".")[0]: one for one in reversed(judgements)}
    first = judgements[0]
    number = first.id.split(".")[0]
    for other, one in jobs.items():
        if other != number:
            raise BadInput(
                f"{_where(one)}id {one.id!r} is not of the job of {first.id!r}; import the labels of one job at a time."
            )
    if not number.isdecimal() or not number.isascii() or len(number) > 18:
        raise _no_id(first)
    return int(number)


# --- files --------------------------------------------------------------------------------------------------------


def form_of(file: str) -> Form:
    """By the file's name; standard output and input are JSON lines. Raises `BadInput`."""
    suffix = Path(file).suffix.lower()
    if file == "-" or suffix == ".jsonl":
        return "jsonl"
    if suffix == ".csv":
        return "csv"
    raise BadInput(f"labels {file!r}: the name ends with neither .csv nor .jsonl; give it one of the two.")


def lines_of(found: Iterable[Item], form: Form) -> Iterator[str]:
    """The items as text, a piece each; `accepted` is left for the judge to fill in."""
    if form == "jsonl":
        for item in found:
            yield json.dumps(asdict(item) | {"accepted": None}, ensure_ascii=False) + "\n"
        return
    yield _csv_row(COLUMNS)
    for item in found:
        yield _csv_row((item.id, item.language, item.prompt, item.completion, ""))


def read_judgements(file: str) -> list[Judgement]:
    """What a judge filled in; items without an answer are passed over. Raises `BadInput` with the line."""
    form = form_of(file)
    try:
        text = sys.stdin.read() if file == "-" else Path(file).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadInput(f"labels {file!r} cannot be read ({error.strerror}); give the path of a file.") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"labels {file!r} is not UTF-8 (byte {error.start}); save it as UTF-8.") from None
    return parse_judgements(text, form, file)


def parse_judgements(text: str, form: Form, source: str) -> list[Judgement]:
    """As `read_judgements`, from a text; source: what messages call it."""
    found = []
    for line, fields in _csv_records(text, source) if form == "csv" else _json_records(text, source):
        where = f"labels {source!r}, line {line}: "
        for column in ("id", "accepted"):
            if column not in fields:
                has = ", ".join(map(str, fields)) or "nothing"
                raise BadInput(f"{where}column {column!r} is missing among {has}; keep the columns of the export.")
        accepted = _accepted(fields["accepted"], where)
        if accepted is not None:
            found.append(Judgement(str(fields["id"]).strip(), accepted, line))
    return found


def _json_records(text: str, source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise BadInput(f"labels {source!r}, line {number}: it is not JSON ({error}); correct it.") from None
        if not isinstance(fields, dict):
            raise BadInput(f"labels {source!r}, line {number}: it is no JSON object; write one a line.")
        yield number, fields


def _csv_records(text: str, source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(sys.maxsize)
    try:
        header, begins = next(reader, []), reader.line_num + 1
        for row in reader:
            if row:
                if len(row) != len(header):
                    raise BadInput(
                        f"labels {source!r}, line {begins}: {len(row)} cells stand under {len(header)} columns; "
                        "separate cells by commas, as the export does."
                    )
                yield begins, dict(zip(header, row, strict=True))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise BadInput(f"labels {source!r}, line {reader.line_num}: it is not CSV ({error}); correct it.") from None
    finally:
        csv.field_size_limit(limit)


def _accepted(value: Any, where: str) -> bool | None:
    """None where nothing was filled in. Raises `BadInput`."""
    if value is None or isinstance(value, bool):
        return value
    said = str(value).strip().lower()
    if not said:
        return None
    if said not in _SAID:
        raise BadInput(f"{where}accepted is {value!r}; say 1 or 0 (true or false, yes or no), or leave it empty.")
    return _SAID[said]


def _csv_row(cells: Sequence[str]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(cells)
    return out.getvalue()


# --- ids ----------------------------------------------------------------------------------------------------------


def _id(job_id: int, one: Offered) -> str:
    """`JOB.SAMPLE.TEXT`: the record's numbers of the first two, and the beginning of the text's hash."""
    return f"{job_id}.{one.sample_id}.{hash_of(one.text)[:_HASH_DIGITS]}"


def _parsed(one: Judgement, job_id: int) -> int:
    """The sample that an id names. Raises `BadInput`."""
    job, *rest = one.id.split(".")
    if len(rest) != 2 or not all(part.isascii() and part.isdecimal() and len(part) <= 18 for part in (job, rest[0])):
        raise _no_id(one)
    if int(job) != job_id:
        raise BadInput(f"{_where(one)}id {one.id!r} is of job {int(job)}, not of job {job_id}; import it there.")
    return int(rest[0])


def _check_once(judgements: Sequence[Judgement]) -> None:
    """Raises `BadInput` where an item is judged twice, and not the same."""
    seen: dict[str, Judgement] = {}
    for one in judgements:
        before = seen.setdefault(one.id, one)
        if before.accepted is not one.accepted:
            earlier = "" if before.line is None else f" on line {before.line}"
            raise BadInput(f"{_where(one)}id {one.id!r} was judged otherwise{earlier}; keep one of the two.")


def _no_id(one: Judgement) -> BadInput:
    return BadInput(f"{_where(one)}id {one.id[:60]!r} is none of an export; keep the ids as they were exported.")


def _where(one: Judgement) -> str:
    return "labels: " if one.line is None else f"labels, line {one.line}: "


# --- order --------------------------------------------------------------------------------------------------------


def _drawn(seed: int, place: SamplePlace) -> bytes:
    """What samples are sorted by: it hangs on the sample and the seed alone, in whatever job and record it is."""
    return _digest(f"{seed} {place.content_hash} {place.position}")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
