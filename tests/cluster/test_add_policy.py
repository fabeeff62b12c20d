"""`shortstop add-policy` and `shortstop rescore` on a finished job, as a user has them, and reports in between."""

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from small_world import POLICIES, World, columns, rows
from typer.testing import CliRunner, Result

import shortstop
from cluster import adding, jobs, rescoring
from cluster.cli import app
from cluster.reports.build import build_report
from cluster.reports.notes import benchmark_notes, job_notes
from db import jobs as record
from db import queue, results
from db.errors import BadInput as RecordBadInput
from db.session import Database, open_database
from engine.errors import BadInput
from workers.scoring.metrics import TextMetric, metrics
from workers.worker import Worker

POLICY = {"confidence": {"threshold": 0.3}}
LABEL = "confidence threshold=0.3"
#: what must not change in an earlier run, bit for bit
TABLES = ("outcome", "timing", "rollup", "score")


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record with one small job that is done."""
    file = tmp_path_factory.mktemp("finished") / "record.db"
    with closing(open_database(f"sqlite:///{file}")) as db:
        assert jobs.work(db, jobs.submit(db, world.spec()), inline=True) is jobs.JobState.DONE
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return file


@pytest.fixture
def url(finished: Path, tmp_path: Path) -> str:
    """A copy of it."""
    shutil.copy(finished, tmp_path / "record.db")
    return f"sqlite:///{tmp_path / 'record.db'}"


@pytest.fixture
def db(url: str) -> Iterator[Database]:
    with closing(open_database(url)) as database:
        yield database


def call(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def earlier(db: Database) -> dict[str, list[tuple[Any, ...]]]:
    """What the record holds of the job's first runs."""
    return {
        table: rows(db, f"SELECT * FROM {table} WHERE run_id <= {len(POLICIES)} ORDER BY 1, 2, 3") for table in TABLES
    }


def test_an_added_policy_ends_as_if_it_had_been_there_from_the_start(
    world: World, db: Database, tmp_path: Path
) -> None:
    """The same bytes, the same scores, the same depth; and what was there is untouched."""
    before, seen = earlier(db), columns(db, 1)
    assert adding.add_policy(db, 1, POLICY) == LABEL
    assert jobs.work(db, 1, inline=True) is jobs.JobState.DONE
    assert earlier(db) == before
    with closing(open_database(f"sqlite:///{tmp_path / 'whole.db'}")) as whole:
        whole_id = jobs.submit(whole, world.spec(policies=[*POLICIES, POLICY]))
        jobs.work(whole, whole_id, inline=True)
        assert columns(db, 1) == columns(whole, whole_id)
        assert {key: row for key, row in columns(db, 1).items() if key[0] != LABEL} == seen
        [ours, theirs] = [
            [row.scores for row in results.completions(one, job_id=1) if row.policy == LABEL] for one in (db, whole)
        ]
        assert ours == theirs
        assert record.runs(db, 1)[-1].summary["mean_exit_layer"] == record.runs(whole, 1)[-1].summary["mean_exit_layer"]
    assert record.job(db, 1).spec["policies"][-1] == POLICY


def test_its_speed_is_held_against_full_depth_beside_it(db: Database) -> None:
    """Not against a full depth of another moment: its own batches carry the time, and the report says so."""
    adding.add_policy(db, 1, POLICY)
    jobs.work(db, 1, inline=True)
    added = record.runs(db, 1)[-1]
    sums = "sum(prefill_ns), sum(decode_ns), sum(decode_tokens), sum(full_decode_ns), count(*)"
    [(prefill, decode, tokens, full_again, n)] = rows(
        db, f"SELECT {sums} FROM timing WHERE timed AND run_id = {added.id}"
    )
    [(full_tokens, full_beside)] = rows(
        db, "SELECT sum(decode_tokens), sum(full_decode_ns) FROM timing WHERE run_id = 1"
    )
    assert (n, full_beside) == (12, None)
    assert added.summary["speedup_token"]["value"] == pytest.approx((full_again / full_tokens) / (decode / tokens))
    assert added.summary["speedup_request"]["value"] == pytest.approx((prefill + full_again) / (prefill + decode))
    report = build_report(db, 1)
    assert [run.summary.full_timed_again for run in report.runs] == [False] * 4 + [True]
    assert any(f"{LABEL} was added later" in note.text for note in benchmark_notes(report.benchmarks[0]))


def test_full_depth_beside_it_leaves_no_outcome(db: Database) -> None:
    adding.add_policy(db, 1, POLICY)
    jobs.work(db, 1, inline=True)
    assert rows(db, "SELECT run_id, count(*) FROM outcome GROUP BY 1") == [(run, 48) for run in range(1, 6)]
    assert rows(db, "SELECT run_id, count(*) FROM timing GROUP BY 1") == [(run, 12) for run in range(1, 6)]


def test_a_report_half_way_shows_the_sums_so_far(db: Database) -> None:
    """Beside the finished runs, which stand as they stood; comparisons wait for the end."""
    before = build_report(db, 1)
    adding.add_policy(db, 1, POLICY)
    worker = Worker(db, "test", timed=True, after_shard=lambda: worker.drain())
    worker.work(1)
    report = build_report(db, 1)
    assert (report.partial, report.state, report.batches_done, report.batches_total) == (True, "running", 16, 24)
    assert [run.summary for run in report.runs[:4]] == [run.summary for run in before.runs]
    added = report.runs[4].summary
    assert (added.samples, added.speedup_token.value, added.change) == (16, None, {})
    assert added.metric("es").value is not None
    assert "16 of 24 batches are done" in job_notes(report)[0].text
    assert any(f"{LABEL} (16 of 48)" in note.text for note in benchmark_notes(report.benchmarks[0]))
    jobs.work(db, 1, inline=True)
    assert not build_report(db, 1).partial


def test_a_resumed_job_is_partial_and_shows_no_old_summary(world: World, tmp_path: Path) -> None:
    """A job that failed has summaries; once it goes on they count less than is done."""
    with closing(open_database(f"sqlite:///{tmp_path / 'fresh.db'}")) as db:
        job_id = jobs.submit(db, world.spec())
        jobs.prepare(db, queue.claim(db, "test", kind="prepare"))
        for _ in range(queue.MAX_ATTEMPTS):
            for _ in range(2):
                queue.claim(db, "doomed", kind="shard")
            queue.reap(db, dead_workers=["doomed"])
        assert jobs.work(db, job_id, inline=True) is jobs.JobState.FAILED
        assert [run.summary.samples for run in build_report(db, job_id).runs] == [16] * 4
        record.resume_job(db, job_id)
        assert build_report(db, job_id).partial
        worker = Worker(db, "test", timed=True, after_shard=lambda: worker.drain())
        worker.work(job_id)
        report = build_report(db, job_id)
        assert (report.partial, [run.summary.samples for run in report.runs]) == (True, [32] * 4)
        assert all(run.summary.speedup_token.low is None for run in report.runs)


def test_a_worker_that_dies_half_way_changes_nothing(world: World, db: Database) -> None:
    """An added policy's shard is taken back and done again like any other."""
    adding.add_policy(db, 1, POLICY)
    assert queue.claim(db, "doomed", kind="shard") is not None
    queue.reap(db, dead_workers=["doomed"])
    assert jobs.work(db, 1, inline=True) is jobs.JobState.DONE
    assert len(columns(db, 1)) == 48 * 5


# --- the command line and the Python door ------------------------------------------------------------------------


def test_the_command_adds_works_and_reports(url: str) -> None:
    done = call("add-policy", 1, "-", "--inline", "--json", "--database", url, stdin="confidence: {threshold: 0.3}")
    assert done.exit_code == 0, done.stderr
    assert f"job 1: {LABEL} added" in done.stderr
    report = json.loads(done.stdout)
    assert (report["state"], report["partial"]) == ("done", False)
    assert [run["policy"] for run in report["benchmarks"][0]["runs"]][-1] == LABEL


BAD = [
    ("{confidnce: {threshold: 0.5}}", "did you mean 'confidence'?"),
    ("{confidence: {threshold: 1.5}}", "threshold"),
    ("{confidence: {threshold: 0.6}}", "'confidence threshold=0.6' already"),
    ("full", "'full' already"),
    ("{fixed: {exit_layer: 3}}", "trained ones: 1, 2, 4, 5"),
    ("{patience: {patience: 9}}", "patience is 9"),
    ("{confidence: ", "is not YAML"),
    ("", "give a name"),
    ("[full]", "give a name"),
]


@pytest.mark.parametrize(("policy", "told"), BAD)
def test_a_bad_policy_is_one_sentence_and_changes_nothing(url: str, db: Database, policy: str, told: str) -> None:
    before = [record.job(db, 1), record.runs(db, 1), record.progress(db, 1), earlier(db)]
    assert_refused(call("add-policy", 1, policy, "--inline", "--database", url), told)
    assert [record.job(db, 1), record.runs(db, 1), record.progress(db, 1), earlier(db)] == before


def assert_refused(result: Result, told: str) -> None:
    assert result.exit_code == 2, result.stderr
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("shortstop: ")
    assert told in line


def test_a_job_that_cannot_take_a_policy_says_why(world: World, url: str, db: Database) -> None:
    assert_refused(call("add-policy", 77, "full", "--database", url), "job 77 does not exist")
    job_id = jobs.submit(db, world.spec(exits=None, policies=["full"]))
    assert_refused(call("add-policy", job_id, "{static: {layers: [2]}}", "--database", url), "is preparing")
    assert jobs.work(db, job_id, inline=True) is jobs.JobState.DONE
    with pytest.raises(BadInput, match=f"needs exits, and job {job_id} has none"):
        adding.add_policy(db, job_id, POLICY)


def test_a_metric_of_another_version_is_renewed_first(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of two versions under one name would be compared with each other."""
    replace_metric(monkeypatch, "es", "es@of-tomorrow", lambda prediction, reference: 0.25)
    with pytest.raises(BadInput, match="renew its scores first: `shortstop rescore 1`"):
        adding.add_policy(db, 1, POLICY)
    rescoring.rescore(db, 1)
    adding.add_policy(db, 1, POLICY)
    jobs.work(db, 1, inline=True)
    assert rows(db, "SELECT DISTINCT version FROM completion_score WHERE metric = 'es'") == [("es@of-tomorrow",)]
    assert {run.summary["metrics"]["es"]["value"] for run in record.runs(db, 1)} == {0.25}


def replace_metric(monkeypatch: pytest.MonkeyPatch, name: str, version: str, function: Any) -> None:
    changed = TextMetric(name, version, "for this test", function)
    monkeypatch.setattr(metrics, "_builtin", dict(metrics._builtin) | {name: changed})


def test_scoring_again_gives_the_same_scores(db: Database) -> None:
    """From what is stored, tokens included: every value as the workers wrote it."""
    before = [(row.run_id, row.sample.id, row.scores) for row in results.completions(db, job_id=1)]
    summaries = [run.summary for run in record.runs(db, 1)]
    rollups = rows(db, "SELECT run_id, task_id, score_counts, score_sums FROM rollup ORDER BY 1, 2")
    done = rescoring.rescore(db, 1)
    assert (done.revision, done.completions, set(done.metrics)) == (2, 48 * 4, {"es", "accepted", "token_agreement"})
    assert [(row.run_id, row.sample.id, row.scores) for row in results.completions(db, job_id=1)] == before
    assert [run.summary for run in record.runs(db, 1)] == summaries
    after = rows(db, "SELECT run_id, task_id, score_counts, score_sums FROM rollup ORDER BY 1, 2")
    assert [(*row[:2], *map(json.loads, row[2:])) for row in after] == [
        (*row[:2], *map(json.loads, row[2:])) for row in rollups
    ]


def test_the_command_adds_a_metric(url: str, db: Database) -> None:
    done = call("rescore", 1, "--metric", "em", "--metric", "exact_agreement", "--json", "--database", url)
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["job"], answer["revision"], answer["completions"]) == (1, 2, 48 * 4)
    assert answer["metrics"] == {"em": "em@1", "exact_agreement": "exact_agreement@1"}
    assert "scoring: 192 of 192 samples" in done.stderr
    names = {"accepted", "em", "es", "exact_agreement", "token_agreement"}
    report = build_report(db, 1)
    assert all(set(run.summary.metrics) == names for run in report.runs)
    assert report.runs[0].summary.metric("exact_agreement").value == 1
    assert set(report.provenance["metrics"]) == names
    assert "em@1" in call("rescore", 1, "--metric", "em", "--database", url).stdout


def test_bad_input_to_rescore_is_one_sentence(world: World, url: str, db: Database) -> None:
    assert_refused(call("rescore", 1, "--metric", "roug_l", "--database", url), "did you mean 'rouge_l'?")
    assert_refused(call("rescore", 77, "--database", url), "job 77")
    job_id = jobs.submit(db, world.spec())
    assert_refused(call("rescore", job_id, "--database", url), "is preparing; score it again once it has ended")
    with pytest.raises(RecordBadInput):
        rescoring.rescore(db, job_id)


def test_python_has_the_same_doors(url: str) -> None:
    report = shortstop.add_policy(1, POLICY, database=url, inline=True)
    assert (report.state, report.runs[-1].policy) == ("done", LABEL)
    again = shortstop.rescore(1, ["em"], database=url)
    assert "em" in again.runs[-1].summary.metrics
