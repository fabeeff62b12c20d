"""How long a job would take, by the batches that were timed."""

from functools import partial

import pytest
from made import planned_benchmark, planned_policy, work
from sqlalchemy import text

from db import jobs, queue
from db.estimating import estimate
from db.session import Database

asked = partial(estimate, weights_hash="weights", device_class="cpu-test")


@pytest.fixture
def timed(db: Database) -> Database:
    """8 samples, 10 new tokens each: a batch of 4 takes 2 s of prefill, 4 s of decoding in full, 3 s with patience."""
    job_id = jobs.create_job(db, name="made", spec={"model": "none"})
    lease = queue.claim(db, "preparer", kind="prepare", job_id=job_id)
    assert lease is not None
    pinned = {"weights_hash": "weights", "max_new_tokens": 10, "batch_size": 4, "shard_batches": 1, "n_layers": 30}
    policies = [planned_policy("full"), planned_policy("patience patience=2")]
    jobs.plan_job(db, lease, pinned=pinned, benchmarks=[planned_benchmark(8)], artifacts=[], policies=policies)
    work(db)
    with db.write() as connection:
        connection.execute(text("UPDATE timing SET timed = :yes, prefill_ns = 2000000000"), {"yes": True})
        for kind, seconds in (("full", 4), ("patience", 3)):
            chosen = "(SELECT id FROM run WHERE policy_kind = :kind)"
            decode = text(f"UPDATE timing SET decode_ns = :ns WHERE run_id IN {chosen}")
            connection.execute(decode, {"ns": seconds * 10**9, "kind": kind})
    return db


def test_a_job_takes_what_samples_took(timed: Database) -> None:
    found = asked(timed, samples=100, max_new_tokens=10, policies=["full", "patience"])
    assert found is not None
    assert found.jobs == 1
    assert found.seconds == pytest.approx(100 * (2 + 4 + 3) / 4)


def test_decoding_goes_with_the_tokens_and_an_unknown_kind_is_the_slowest(timed: Database) -> None:
    found = asked(timed, samples=4, max_new_tokens=30, policies=["patience", "fixed"])
    assert found is not None
    assert found.seconds == pytest.approx(2 + 3 * (3 + 4))


def test_other_weights_and_other_devices_say_nothing(timed: Database) -> None:
    a_job = {"samples": 100, "max_new_tokens": 10, "policies": ["full"]}
    assert estimate(timed, weights_hash="others", device_class="cpu-test", **a_job) is None  # type: ignore[arg-type]
    assert estimate(timed, weights_hash="weights", device_class="other", **a_job) is None  # type: ignore[arg-type]


def test_batches_that_were_not_timed_say_nothing(timed: Database) -> None:
    with timed.write() as connection:
        connection.execute(text("UPDATE timing SET timed = :no"), {"no": False})
    assert asked(timed, samples=1, max_new_tokens=1, policies=["full"]) is None
