"""Figures for whoever watches are those of the record, and Prometheus can read them."""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
import test_plans
from made import claimed, planned_job, results_of, summarise, work
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from cluster.metrics import Metrics, served
from cluster.status import Watcher
from db import figures, jobs, queue, results
from db.session import Database, open_database
from engine.errors import BadInput
from workers.worker import GpuMemory


def scraped(metrics: Metrics) -> dict[str, float]:
    """Samples by name and labels, as Prometheus reads them."""
    families = text_string_to_metric_families(metrics.text().decode())
    samples = [sample for family in families for sample in family.samples]
    return {" ".join([one.name.removeprefix("shortstop_"), *labels(one.labels)]): one.value for one in samples}


def labels(named: dict[str, str]) -> list[str]:
    return [named[name] for name in sorted(named)]


def job_of(db: Database, n_samples: int, **options: int) -> int:
    """A job whose shards are ready; of another benchmark for another number of samples."""
    return planned_job(db, n_samples, benchmarks=(f"lines-{n_samples}",), **options)


def aged(db: Database, sql: str) -> None:
    with db.write() as connection:
        connection.execute(text(sql))


def test_the_queue_by_state(db: Database) -> None:
    first, second = job_of(db, 16), job_of(db, 8)
    jobs.pause_job(db, second)
    jobs.create_job(db, name="new", spec={"model": "none"})
    lease = claimed(db, "a@node-1")
    queue.fail(db, claimed(db, "b@node-2"), "it broke")
    claimed(db, "b@node-2")
    assert queue.claim(db, "c@node-2", kind="shard", job_id=second) is None
    found = figures.queue_figures(db)
    assert found.jobs == {"preparing": 1, "ready": 0, "running": 1, "paused": 1}
    assert {key: count for key, count in found.tasks.items() if count} == {
        ("prepare", "ready"): 1,
        ("shard", "ready"): 1,
        ("shard", "delayed"): 1,
        ("shard", "paused"): 2,
        ("shard", "leased"): 2,
    }
    assert (found.busy, found.idle, found.expired) == (2, 1, 0)
    assert [(one.worker, one.job_id, one.done_batches) for one in figures.holders(db)] == [
        ("a@node-1", first, 0),
        ("b@node-2", first, 0),
    ]
    aged(db, f"UPDATE task SET lease_until = lease_until - 40 WHERE id = {lease.task_id}")
    assert figures.queue_figures(db).expired == 1
    assert figures.holders(db)[0].lease_seconds < 0


def test_the_age_of_what_is_ready_counts_from_when_it_could_be_claimed(db: Database) -> None:
    job_id = job_of(db, 8)
    assert 0 <= figures.queue_figures(db).oldest_ready_seconds["shard"] < 60
    moved = "UPDATE task SET run_after = (SELECT max(at) FROM job_event) + {} WHERE kind = 'shard'"
    aged(db, moved.format(-(10**6)))  # of no account: it was planned a moment ago
    assert figures.queue_figures(db).oldest_ready_seconds["shard"] < 60
    aged(db, moved.format(10**6))  # after a failure it is not ready yet
    found = figures.queue_figures(db)
    assert (found.oldest_ready_seconds["shard"], found.tasks["shard", "delayed"]) == (0, 2)
    aged(db, "UPDATE task SET run_after = 0")
    jobs.pause_job(db, job_id)
    assert figures.queue_figures(db).oldest_ready_seconds["shard"] == 0


def test_counters_count_what_happened_since_they_began(db: Database) -> None:
    """Claims, losses, tokens, seconds: of jobs that were there, that came, and that came and ended between scrapes."""
    old = job_of(db, 12)
    results.commit_shard(db, lease := claimed(db), results_of(db, lease))
    metrics = Metrics(db)
    before = scraped(metrics)
    assert {name: before[f"{name}_total"] for name in ("attempts", "tokens", "leases_lost", "jobs_submitted")} == {
        "attempts": 0, "tokens": 0, "leases_lost": 0, "jobs_submitted": 0
    }  # fmt: skip
    done = figures.shard_figures(db, old)
    claimed(db, "doomed")
    [lost] = queue.reap(db, dead_workers=["doomed"])
    queue.refund(db, lost.task_id, lost.epoch)
    assert scraped(metrics)["attempts_total"] == 1
    work(db)
    assert results.finalise(db, old, summarise)
    quick = job_of(db, 6)
    work(db)
    assert results.finalise(db, quick, summarise)
    whole, added = figures.shard_figures(db, old), figures.shard_figures(db, quick)
    for _ in range(2):  # looking changes nothing
        after = scraped(metrics)
        assert after["attempts_total"] == 1 + 2 + 2
        assert (after["leases_lost_total"], after["leases_refunded_total"]) == (1, 1)
        assert (after["jobs_submitted_total"], after["jobs_done_total"]) == (1, 2)
        assert after["tokens_total"] == whole.tokens - done.tokens + added.tokens > 0
        assert after["samples_total"] == 2 * (12 - 4 + 6)
        assert after["shard_seconds_count"] == after["shard_seconds_bucket +Inf"] == 4
        assert after["shard_seconds_sum"] == pytest.approx(whole.seconds - done.seconds + added.seconds)
    assert metrics._seen == {}, "jobs that ended are forgotten"


def test_a_job_that_goes_on_again_counts_from_there(db: Database) -> None:
    job_id = job_of(db, 4)
    metrics = Metrics(db)
    for _ in range(queue.MAX_ATTEMPTS):
        claimed(db, "doomed")
        queue.reap(db, dead_workers=["doomed"])
    assert results.finalise(db, job_id, summarise)
    assert scraped(metrics)["attempts_total"] == 4
    jobs.retry_job(db, job_id)
    assert scraped(metrics)["attempts_total"] == 4
    work(db)
    assert (scraped(metrics)["attempts_total"], scraped(metrics)["shards_dead_total"]) == (5, 1)


def test_a_database_that_goes_away_in_the_middle_takes_no_count_with_it(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics(db)
    planned_job(db, 8)
    work(db)
    with monkeypatch.context() as patch:
        patch.setattr(figures, "shard_figures", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            metrics.text()
    assert scraped(metrics)["attempts_total"] == 2
    assert scraped(metrics)["samples_total"] == 16


def test_cancelling_and_splitting_are_no_attempts(db: Database) -> None:
    job_id = job_of(db, 24, shard_batches=6)
    metrics = Metrics(db)
    lease = claimed(db)
    results.commit_shard(db, lease, results_of(db, lease, end_batch=2), split_at=2)
    assert scraped(metrics)["attempts_total"] == 1
    claimed(db)
    jobs.cancel_job(db, job_id)
    assert (scraped(metrics)["attempts_total"], scraped(metrics)["jobs_cancelled_total"]) == (2, 1)


def test_series_do_not_grow_with_the_record(db: Database) -> None:
    metrics = Metrics(db)
    names = set(scraped(metrics))
    for number in range(3):
        job_of(db, 8 + number)
        claimed(db, f"worker-{number}@node-{number}")
    assert set(scraped(metrics)) == names
    assert not re.search(r"worker-|made|node-", metrics.text().decode())


def test_gpus_are_told_of_where_somebody_knows(db: Database) -> None:
    metrics = Metrics(db, gpus=lambda: [("node-1", GpuMemory("0", 3 * 2**30, 80 * 2**30))])
    found = scraped(metrics)
    assert found["gpu_memory_used_bytes 0 node-1"] == 3 * 2**30
    assert found["gpu_memory_bytes 0 node-1"] == 80 * 2**30
    assert "gpu_memory_bytes" not in "".join(scraped(Metrics(db)))


def test_a_port_serves_them(db: Database) -> None:
    job_of(db, 8)
    with served(Metrics(db), 0) as port:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            assert b'shortstop_tasks{kind="shard",state="ready"} 2.0' in answer.read()
        with pytest.raises(BadInput, match=f"--metrics-port {port}: .* cannot be had"), served(Metrics(db), port):
            pass


DOORS = {
    "queue": figures.queue_figures,
    "jobs": lambda db: figures.job_figures(db, after=figures.newest_job(db)),
    "shards": lambda db: figures.shard_figures(db, figures.newest_job(db)),
    "holders": figures.holders,
    "metrics": lambda db: Metrics(db).text(),
    "status": lambda db: Watcher(db).look(),
}


@pytest.fixture(scope="module", params=["sqlite", "sqlite, analysed", "postgresql"])
def old_record(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """Hundreds of jobs that ended, and two that are open."""
    if request.param.startswith("sqlite"):
        url = f"sqlite:///{tmp_path_factory.mktemp('figures') / 'record.db'}"
        yield from grown(url, analysed=request.param != "sqlite")
        return
    with request.getfixturevalue("new_postgresql_url")() as url:
        yield from grown(url, analysed=True)


def grown(url: str, *, analysed: bool) -> Iterator[Database]:
    db = open_database(url)
    done = planned_job(db, 240, batch_size=4)
    work(db)
    results.finalise(db, done, summarise)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_plans, "COPIES", 400)
        for table in ("job", "run", "task", "rollup"):
            test_plans._copy(db, table)
    for _ in range(2):
        lease = claimed(db, job_id=planned_job(db, 160, batch_size=4, benchmarks=("more",)))
        results.commit_shard(db, lease, results_of(db, lease))
        claimed(db)
    if analysed:
        aged(db, "ANALYZE")
    yield db
    db.close()


@pytest.mark.parametrize("door", DOORS)
def test_watching_reads_no_big_table_from_end_to_end(old_record: Database, door: str) -> None:
    """Red where a condition is written so that an index cannot be used."""
    with test_plans.asked(old_record) as statements:
        DOORS[door](old_record)
    assert statements
    for statement, parameters in statements:
        plan = test_plans.explained(old_record, statement, parameters)
        assert read_in_full(plan) == set(), f"{statement}\n{plan}"


def read_in_full(plan: str) -> set[str]:
    """Old jobs must cost nothing either."""
    of_jobs = re.findall(r"Seq Scan on job\b|^SCAN job(?! USING (?:COVERING )?INDEX ix_job_open)", plan, re.MULTILINE)
    return test_plans.read_in_full(plan) | set(of_jobs)


def test_the_document_names_every_metric(db: Database) -> None:
    families = Metrics(db, gpus=lambda: [("n", GpuMemory("0", 1, 2))]).collect()
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for family in families:
        suffix = "_total" if family.type == "counter" else ""
        short = f"…_{family.name.rsplit('_', 1)[-1]}{suffix}`"
        assert f"`{family.name}{suffix}`" in text or short in text, family.name
