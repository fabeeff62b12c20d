"""Completions that were made elsewhere: read, matched with samples, ended and scored as our own are."""

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cluster.adding import check_metrics
from cluster.prepare import git_revision, metrics_of_workers, package_versions, planned_benchmark
from db import elsewhere, jobs, readings
from db.elsewhere import Made, imported_policy
from db.errors import Conflict
from db.events import LOCAL
from db.queue import storable
from db.records import BenchmarkRow, JobState, PlannedPolicy, SampleRow
from db.session import Database
from engine.errors import BadInput
from workers.benchmarks.catalogue import load_benchmark
from workers.benchmarks.ends import cut, parse_ends
from workers.benchmarks.spec import parse_benchmark
from workers.scoring.metrics import score_texts
from workers.worker import finalise

#: samples that are read and scored at once
_WINDOW = 500
#: of a new job: the record cuts every benchmark into batches
_BATCH_SIZE = 8
_FIELDS = ("id", "prompt_sha256", "benchmark", "completion")


@dataclass(frozen=True)
class Given:
    """A completion on a line of a file."""

    line: int
    text: str
    id: str | None  #: of the sample; None where the prompt's hash tells
    prompt_sha256: str | None
    benchmark: str | None  #: where the file says so


@dataclass(frozen=True)
class File:
    """What a file of completions holds."""

    name: str
    sha256: str
    completions: list[Given]

    @property
    def source(self) -> dict[str, Any]:
        """As the record keeps it."""
        return {"source": self.name, "sha256": self.sha256}


@dataclass(frozen=True)
class CompletionsImported:
    """What became of a file of completions."""

    job: int
    run: str  #: its name in reports
    completions: int  #: that were scored
    lacking: int  #: samples without one: they ended with an error
    left_out: int  #: completions of samples that the job does not have
    first_left_out: str | None = None


def read_completions(file: str) -> File:
    """Read JSON lines (`-` is standard input). Raises `BadInput` with the line."""
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).expanduser().read_bytes()
    except OSError as error:
        raise BadInput(f"completions {file!r} cannot be read ({error.strerror}); give the path of a file.") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"completions {file!r} is not UTF-8 (byte {error.start}); save it as UTF-8.") from None
    found = [
        _given(f"completions {file!r}, line {number}: ", number, line)
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not found:
        raise BadInput(f"completions {file!r} holds none; write a JSON object a line.")
    return File("standard input" if file == "-" else Path(file).name, hashlib.sha256(content).hexdigest(), found)


def _given(where: str, number: int, line: str) -> Given:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{where}it is not JSON ({error}); correct it.") from None
    if not isinstance(fields, dict):
        raise BadInput(f"{where}it is no JSON object; write one a line.")
    _check_fields(where, fields)
    id = fields.get("id")
    return Given(
        line=number,
        text=fields["completion"],
        id=None if id is None else str(id),
        prompt_sha256=fields.get("prompt_sha256"),
        benchmark=fields.get("benchmark"),
    )


def _check_fields(where: str, fields: dict[str, Any]) -> None:
    """Raises `BadInput`."""
    if "completion" not in fields:
        near = get_close_matches("completion", fields, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}" if near else f"it has {', '.join(fields) or 'none'}"
        raise BadInput(f"{where}field 'completion' is missing ({hint}); name it so.")
    if (fields.get("id") is None) == (fields.get("prompt_sha256") is None):
        raise BadInput(f"{where}give the sample's 'id', or 'prompt_sha256', and not both.")
    for name in _FIELDS:
        value = fields.get(name)
        is_number = name == "id" and isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not isinstance(value, str) and not is_number:
            raise BadInput(f"{where}field {name!r} is a {type(value).__name__}, not text; correct it.")
        if isinstance(value, str) and storable(value) != value:
            raise BadInput(f"{where}field {name!r} holds a NUL or half a surrogate pair; remove it.")
    if fields["completion"] is None:
        raise BadInput(f"{where}field 'completion' is null; leave the line out, the sample then counts as an error.")


# --- into a job -----------------------------------------------------------------------------------------------------


def import_into(db: Database, job_id: int, file: File, label: str, *, who: str = LOCAL) -> CompletionsImported:
    """Add completions to a job that is done, as a run beside its own. Raises `BadInput`, `Missing`, `Conflict`."""
    job = jobs.job(db, job_id)
    if job.state is not JobState.DONE:
        raise Conflict(f"job {job_id} is {job.state}; completions can be imported into a job that is done.")
    versions = dict((job.pinned or {})["metrics"])
    check_metrics(job_id, versions)
    policy = imported_policy(_checked(label), file.source)
    benchmarks = {one.benchmark_id: one.benchmark for one in jobs.runs(db, job_id)}
    matched = _Matched(file)
    for benchmark_id, name in benchmarks.items():
        matched.look_at(benchmark_id, name, list(_samples(db, jobs.benchmark(db, benchmark_id))))
    matched.check(f"job {job_id}")
    scored = {
        id: _scored(matched.of[id], jobs.benchmark(db, id), _samples(db, jobs.benchmark(db, id)), versions)
        for id in matched.of
    }
    elsewhere.add_completions(db, job_id, policy, scored, versions, who=who)
    finalise(db, job_id)
    samples = sum(jobs.benchmark(db, id).n_samples for id in scored)
    return _told(job_id, policy, matched, scored, samples)


def import_as_job(db: Database, benchmark: Any, file: File, label: str, *, who: str = LOCAL) -> CompletionsImported:
    """Make a job of nothing but these completions. benchmark: in any form that a spec takes. Raises `BadInput`."""
    policy = imported_policy(_checked(label), file.source)
    loaded = load_benchmark(parse_benchmark(benchmark), tokenizer_of=_no_tokenizer, max_new_tokens=1)
    planned = planned_benchmark(loaded)
    row = BenchmarkRow(0, loaded.name, loaded.version, loaded.content_hash, loaded.ends, len(loaded.samples), ())
    samples = [SampleRow(0, position, *fields) for position, fields in enumerate(planned.samples)]
    matched = _Matched(file)
    matched.look_at(0, loaded.name, samples)
    matched.check(f"benchmark {loaded.name!r}")
    versions = metrics_of_workers(None)
    scored = {0: _scored(matched.of[0], row, iter(samples), versions)}
    pinned = {
        "n_layers": None,
        "batch_size": _BATCH_SIZE,
        "metrics": versions,
        "benchmarks": {loaded.name: loaded.content_hash},
        "versions": package_versions(),
        "git_revision": git_revision(),
    }
    job_id = elsewhere.new_job(db, policy.label, pinned, [planned], policy, scored, versions, who=who)
    finalise(db, job_id)
    return _told(job_id, policy, matched, scored, len(samples))


def _told(
    job_id: int, policy: PlannedPolicy, matched: "_Matched", scored: dict[int, dict[int, Made]], samples: int
) -> CompletionsImported:
    count = sum(map(len, scored.values()))
    left_out = matched.left_out
    first = None if not left_out else f"line {left_out[0].line}: {left_out[0].id or left_out[0].prompt_sha256}"
    return CompletionsImported(job_id, policy.label, count, samples - count, len(left_out), first)


def _checked(label: str) -> str:
    """Raises `BadInput`."""
    name = label.strip()
    if not name or len(name) > 100 or not name.isprintable() or name == "full" or storable(name) != name:
        raise BadInput(
            f"name {label[:40]!r} cannot be that of a run made elsewhere; give 1 to 100 printable characters, and not "
            "`full`."
        )
    return name


def _no_tokenizer() -> Any:
    raise BadInput(
        "benchmark: its prompts are cut by a model's tokens, and completions made elsewhere have no model; import them "
        "into a job that has the benchmark (--job)."
    )


def _samples(db: Database, of: BenchmarkRow) -> Iterator[SampleRow]:
    for first in range(0, of.n_samples, _WINDOW):
        yield from readings.samples_of(db, of.id, first, first + _WINDOW)


# --- which sample ---------------------------------------------------------------------------------------------------


@dataclass
class _Matched:
    """The completions of a file by the samples that they are of: by benchmark, then by position."""

    file: File
    of: dict[int, dict[int, Given]] = field(default_factory=dict)
    _seen: set[int] = field(default_factory=set)  #: lines
    _names: list[str] = field(default_factory=list)

    def look_at(self, benchmark_id: int, name: str, samples: Sequence[SampleRow]) -> None:
        """Find the completions of one benchmark's samples. Raises `BadInput` for two of one sample."""
        places: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
        by_prompt = any(one.prompt_sha256 is not None for one in self.file.completions)
        for sample in samples:
            places["id", sample.name].append(sample.position)
            if by_prompt:
                places["prompt", hashlib.sha256(sample.prompt.encode()).hexdigest()].append(sample.position)
        self._names += [sample.name for sample in samples]
        for one in self.file.completions:
            if one.benchmark not in (None, name):
                continue
            key = ("prompt", (one.prompt_sha256 or "").lower()) if one.id is None else ("id", one.id)
            for position in places.get(key, []):
                self._take(benchmark_id, position, one)

    def _take(self, benchmark_id: int, position: int, one: Given) -> None:
        if one.id is not None and one.line in self._seen:
            raise self._fault(one, "is a sample of two benchmarks of the job; say which with the field 'benchmark'")
        before = self.of.setdefault(benchmark_id, {}).setdefault(position, one)
        if before is not one:
            raise self._fault(one, f"has a completion on line {before.line} already; keep one of the two")
        self._seen.add(one.line)

    @property
    def left_out(self) -> list[Given]:
        """The completions of no sample that was looked at."""
        return [one for one in self.file.completions if one.line not in self._seen]

    def check(self, where: str) -> None:
        """Raises `BadInput` where no completion is of a sample."""
        if self.of:
            return
        first = self.file.completions[0]
        near = get_close_matches(first.id or "", self._names[:10_000], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"its first sample is {self._names[0]!r}."
        raise self._fault(first, f"is of no sample of {where}, nor is any other; {hint[:-1]}", hint[-1])

    def _fault(self, one: Given, sentence: str, end: str = ".") -> BadInput:
        which = f"id {one.id!r}" if one.id is not None else f"prompt {(one.prompt_sha256 or '')[:16]!r}"
        return BadInput(f"completions {self.file.name!r}, line {one.line}: {which} {sentence}{end}")


def _scored(
    given: dict[int, Given], of: BenchmarkRow, samples: Iterator[SampleRow], versions: dict[str, str]
) -> dict[int, Made]:
    """By position: each up to where the benchmark ends a completion, and scored with all metrics of texts."""
    ends = parse_ends(of.ends)
    mine = [one for one in samples if one.position in given]
    texts = [cut(one.prompt, given[one.position].text, ends, one.language) for one in mine]
    columns = score_texts(versions, texts, [one.reference for one in mine])
    return {
        one.position: Made(text, {metric: float(values[i]) for metric, values in columns.items()})
        for i, (one, text) in enumerate(zip(mine, texts, strict=True))
    }
