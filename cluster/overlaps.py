"""`shortstop benchmarks overlap`: what of a benchmark stands in a corpus, kept in the record where a job has it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from db import jobs, overlaps, results
from db.overlaps import OverlappingRow
from db.session import Database
from engine.errors import BadInput
from workers.benchmarks.catalogue import load_benchmark
from workers.benchmarks.overlap import Overlap, overlap
from workers.benchmarks.sample import Sample
from workers.benchmarks.spec import parse_benchmark
from workers.pinned import Pinned
from workers.rereading import Texts


@dataclass(frozen=True)
class Looked:
    """A benchmark that was looked for in a corpus."""

    benchmark: str
    samples: int
    kept: bool  #: whether the record has the benchmark, and now the flags of its samples
    overlap: Overlap


@dataclass(frozen=True)
class _Wanted:
    name: str
    content_hash: str
    samples: Sequence[Sample]


def look(what: str, corpora: Sequence[str], db: Database | None) -> list[Looked]:
    """Look for a benchmark, or for all of a job, in corpora: folders, files of JSON lines, installed packages.

    what: a name, a file that declares a benchmark, a mapping as in a spec, or a job's number. db: where flags are kept;
    None: nowhere. Raises `BadInput`.
    """
    found = []
    for wanted in _of_job(db, int(what)) if db is not None and what.isdecimal() else [_named(what)]:
        for corpus in corpora:
            came_out = overlap(wanted.samples, corpus)
            flagged = [
                OverlappingRow(corpus, one.position, one.shared, one.runs, one.found_in) for one in came_out.flagged
            ]
            kept = db is not None and overlaps.keep(
                db,
                wanted.content_hash,
                corpus=corpus,
                texts=came_out.texts,
                characters=came_out.characters,
                judged=came_out.judged,
                flagged=flagged,
            )
            found.append(Looked(wanted.name, len(wanted.samples), kept, came_out))
    return found


def _named(what: str) -> _Wanted:
    value: Any = what
    if what.lstrip().startswith("{"):
        try:
            value = yaml.safe_load(what)
        except yaml.YAMLError:
            raise BadInput(
                f"benchmark {what!r} is no mapping; write one as in a spec, such as {{source: ./src}}."
            ) from None
    asked = parse_benchmark(value)

    def no_tokenizer() -> Any:
        raise BadInput(f"benchmark {what!r} is cut by a model's tokens; name a job that has it, by its number.")

    benchmark = load_benchmark(asked, tokenizer_of=no_tokenizer, max_new_tokens=1)
    return _Wanted(benchmark.name, benchmark.content_hash, benchmark.samples)


def _of_job(db: Database, job_id: int) -> Iterator[_Wanted]:
    """The job's benchmarks from the record; those whose texts it does not have are read again."""
    job = jobs.job(db, job_id)
    if job.pinned is None:
        raise BadInput(f"job {job_id} is {job.state}, so its benchmarks are not known; look once it is prepared.")
    texts = Texts()
    for name, benchmark_id in {run.benchmark: run.benchmark_id for run in jobs.runs(db, job_id)}.items():
        kept = jobs.benchmark(db, benchmark_id)
        rows = results.samples_of(db, benchmark_id, 0, kept.n_samples)
        rows = texts.restored(rows, kept.content_hash, Pinned.model_validate(job.pinned))
        samples = [Sample(row.name, row.prompt, row.reference, row.language, row.source_group) for row in rows]
        yield _Wanted(name, kept.content_hash, samples)
