"""`store_text: false`: hashes and metrics in the record; a worker reads the source again, if it is the same."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from small_world import World

from cluster import jobs, rescoring
from cluster.contents import hashes
from cluster.reports.build import build_report
from cluster.reports.notes import TEXTS_WITHHELD, benchmark_notes
from cluster.spec import parse_job
from db import results
from db.checks import check
from db.session import Database, open_database
from engine.errors import BadInput
from workers.benchmarks.sample import text_hash

SECRET = "swordfish"
POLICIES: list[Any] = ["full", {"confidence": {"threshold": 0.6}}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(3):
        lines = [f"{SECRET}_{number}_{i} = {i}" for i in range(4)]
        (folder / f"part{number}.py").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'own.db'}"


@pytest.fixture
def db(url: str) -> Iterator[Database]:
    with closing(open_database(url)) as database:
        yield database


def spec(world: World, source: Path, *, store_text: bool) -> Any:
    asked = {"source": str(source), "ends": "statement", "store_text": store_text}
    return parse_job(world.fields(benchmarks=[asked], policies=POLICIES, metrics=["em", "es", "token_agreement"]))


def scores(db: Database, job_id: int) -> dict[tuple[str, str], dict[str, float]]:
    return {(row.policy, row.sample.name): row.scores for row in results.completions(db, job_id=job_id)}


def test_no_text_reaches_the_record_and_the_scores_are_the_same(
    world: World, source: Path, db: Database, tmp_path: Path
) -> None:
    """Not a prompt, reference or completion in any byte of the database's files; all metrics as with the texts."""
    job = jobs.submit(db, spec(world, source, store_text=False))
    assert jobs.work(db, job, inline=True) is jobs.JobState.DONE
    with closing(open_database(f"sqlite:///{tmp_path / 'open.db'}")) as other:
        kept = jobs.submit(other, spec(world, source, store_text=True))
        assert jobs.work(other, kept, inline=True) is jobs.JobState.DONE
        assert scores(db, job) == scores(other, kept)
        texts = {(row.policy, row.sample.name): row for row in results.completions(other, job_id=kept)}
        assert any(SECRET.encode() in file.read_bytes() for file in tmp_path.glob("open.db*"))
    files = list(tmp_path.glob("own.db*"))
    written = {row.outcome.text.encode() for row in texts.values() if row.outcome.text and len(row.outcome.text) > 5}
    assert written
    for file in files:
        content = file.read_bytes()
        assert not any(text in content for text in (SECRET.encode(), *written))
    for row in results.completions(db, job_id=job):
        same = texts[row.policy, row.sample.name]
        assert row.sample.prompt == text_hash(same.sample.prompt)
        assert row.outcome.text == text_hash(same.sample.prompt, same.outcome.text or "")
        assert row.outcome.tokens is not None
        assert set(row.outcome.tokens.token_ids.tolist()) == {-1}
        assert row.outcome.tokens.exit_layers.tolist() == same.outcome.tokens.exit_layers.tolist()
    assert list(check(db, hashes())) == []


def test_the_report_says_so_and_scoring_again_is_refused(world: World, source: Path, db: Database) -> None:
    job = jobs.submit(db, spec(world, source, store_text=False))
    assert jobs.work(db, job, inline=True) is jobs.JobState.DONE
    [benchmark] = build_report(db, job).benchmarks
    assert TEXTS_WITHHELD in [note.text for note in benchmark_notes(benchmark)]
    assert benchmark.examples == []
    with pytest.raises(BadInput, match="has store_text: false, so its completions are hashes"):
        rescoring.rescore(db, job, ["es"])


def test_a_trace_would_keep_the_text_and_is_refused(world: World, source: Path) -> None:
    """Its tokens, and the target as its outcome's text, would be in the record."""
    asked = {"source": str(source), "store_text": False}
    fields = {name: value for name, value in world.fields(benchmarks=[asked]).items() if name != "policies"}
    with pytest.raises(BadInput, match="store_text is false, and a trace keeps the tokens of its targets"):
        parse_job(fields | {"trace": "reference"})
    parse_job(fields | {"trace": "reference", "benchmarks": [{"source": str(source)}]})


def test_a_source_that_changed_meanwhile_is_not_completed(world: World, source: Path, db: Database) -> None:
    """One sentence, the shard goes back, and with the source as it was the job goes on."""
    job = jobs.submit(db, spec(world, source, store_text=False))
    jobs.prepare_next(db, "test", job, workers=1, lease_seconds=30)
    before = (source / "part1.py").read_text()
    (source / "part1.py").write_text(before.replace("= 2", "= 3"))
    with pytest.raises(BadInput, match=r"keeps no text in the record, and on .* it has changed") as caught:
        jobs.work(db, job, inline=True)
    assert SECRET not in str(caught.value)
    (source / "part1.py").write_text(before)
    assert jobs.work(db, job, inline=True) is jobs.JobState.DONE
