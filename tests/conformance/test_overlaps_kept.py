"""What a benchmark has in common with a corpus: kept beside its samples, anew in the place of what was known before."""

from made import planned_job
from sqlalchemy import select

from db import jobs, overlaps
from db.overlaps import OverlappingRow
from db.queries import query
from db.session import Database
from db.tables import benchmark


def test_flags_are_kept_for_a_benchmark_that_the_record_has(db: Database) -> None:
    """Looking again replaces the flags of that corpus, not those of another; the view has a row each."""
    job_id = planned_job(db, 6)
    benchmark_id = jobs.runs(db, job_id)[0].benchmark_id
    with db.read() as connection:
        content_hash = connection.execute(select(benchmark.c.content_hash)).scalar_one()

    def keep(corpus: str, *positions: int, of: str = content_hash) -> bool:
        flagged = [OverlappingRow(corpus, position, 1, 3, "f.py") for position in positions]
        return overlaps.keep(db, of, corpus=corpus, texts=2, characters=9, judged=5, flagged=flagged)

    assert overlaps.of_benchmark(db, benchmark_id) == ([], [])
    assert keep("one", 1, 4)
    assert keep("two", 4)
    assert keep("one", 2)
    assert not keep("one", 5, of="of no benchmark")
    corpora, flagged = overlaps.of_benchmark(db, benchmark_id)
    assert [(row.corpus, row.texts, row.judged) for row in corpora] == [("one", 2, 5), ("two", 2, 5)]
    assert [(row.position, row.corpus) for row in flagged] == [(2, "one"), (4, "two")]
    with query(db, "SELECT position, corpus, shared, runs, found_in FROM overlap ORDER BY position") as answer:
        assert list(answer) == [(2, "one", 1, 3, "f.py"), (4, "two", 1, 3, "f.py")]
