"""What of a benchmark was found in a corpus: kept beside its samples, for every job that uses them."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, insert, select

from db import schema
from db.clock import now
from db.session import Database
from db.tables import benchmark, corpus_overlap, overlapping_sample


@dataclass(frozen=True)
class OverlapRow:
    """That a benchmark was looked for in a corpus. The time is seconds since 1970 by the database's clock."""

    corpus: str
    texts: int
    characters: int
    judged: int  #: samples that could be judged at all
    looked_at: float


@dataclass(frozen=True)
class OverlappingRow:
    """A sample that stands in a corpus in part."""

    corpus: str
    position: int  #: in the benchmark's order
    shared: int  #: of its runs of tokens those that the corpus has
    runs: int
    found_in: str


def keep(
    db: Database,
    content_hash: str,
    *,
    corpus: str,
    texts: int,
    characters: int,
    judged: int,
    flagged: Sequence[OverlappingRow],
) -> bool:
    """Write what was found, in the place of what was known of that corpus before. False: no job has the benchmark."""
    with db.write() as connection:
        schema.hold(connection)
        asked = select(benchmark.c.id).where(benchmark.c.content_hash == content_hash).with_for_update()
        benchmark_id = connection.execute(asked).scalar_one_or_none()
        if benchmark_id is None:
            return False
        for table in (overlapping_sample, corpus_overlap):
            connection.execute(delete(table).where(table.c.benchmark_id == benchmark_id, table.c.corpus == corpus))
        key = {"benchmark_id": benchmark_id, "corpus": corpus}
        about = {"texts": texts, "characters": characters, "judged": judged, "looked_at": now()}
        connection.execute(insert(corpus_overlap).values(key | about))
        if flagged:
            connection.execute(insert(overlapping_sample), [vars(row) | key for row in flagged])
        return True


def of_benchmark(db: Database, benchmark_id: int) -> tuple[list[OverlapRow], list[OverlappingRow]]:
    """The corpora that a benchmark was looked for in, and the samples that stand there; both in order."""
    with db.read() as connection:
        looked = select(*(corpus_overlap.c[name] for name in OverlapRow.__dataclass_fields__))
        found = select(*(overlapping_sample.c[name] for name in OverlappingRow.__dataclass_fields__))
        rows = connection.execute(
            looked.where(corpus_overlap.c.benchmark_id == benchmark_id).order_by(corpus_overlap.c.corpus)
        )
        flagged = connection.execute(
            found.where(overlapping_sample.c.benchmark_id == benchmark_id).order_by(
                overlapping_sample.c.position, overlapping_sample.c.corpus
            )
        )
        return [OverlapRow(*row) for row in rows], [OverlappingRow(*row) for row in flagged]
