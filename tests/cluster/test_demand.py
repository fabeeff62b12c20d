"""Who gets how many workers: without Ray, without a clock."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.fleet import members
from cluster.fleet.demand import Need, Place, Room, Shares, allocate, grouped, need_of
from cluster.fleet.members import Blame, Member
from cluster.prepare import cores
from db.records import JobState, OpenJob
from workers.pinned import EngineKey

CPU, GPU = Place("cpu", 2), Place("cuda", 1, 1.0)


def engine(model: str) -> EngineKey:
    return EngineKey(model, model, None, "cpu", "float32", 1, "off")


def job(job_id: int = 1, *, model: str = "a", ready: int = 5, priority: int = 0, **pinned: Any) -> OpenJob:
    facts = {"model": model, "weights_hash": model, "device": "cpu", "threads": 1, "dtype": "float32"} | pinned
    return OpenJob(job_id, priority, JobState.RUNNING, {}, facts, ready, 0)


def preparing(**spec: Any) -> OpenJob:
    return OpenJob(9, 0, JobState.PREPARING, spec, None, 1, 0)


def test_jobs_of_one_engine_share_their_workers() -> None:
    groups = grouped([job(1), job(2, model="b"), job(3), job(4, ready=0)], Shares())
    assert [[one.id for one in group.jobs] for group in groups] == [[1, 3], [2]]
    assert groups[0].duty.shards == (1, 3)
    assert groups[0].tasks == 10


def test_what_a_job_pins_is_what_its_worker_holds() -> None:
    assert need_of(job(device="cuda"), Shares(gpus_per_worker=0.5)).place.resources == {"GPU": 0.5}
    assert need_of(job(threads=3), Shares()).place.resources == {"CPU": 3}


@pytest.mark.parametrize(
    ("spec", "shares", "place"),
    [
        ({}, Shares(), Place("cpu", cores())),
        ({"device": "auto", "threads": 1}, Shares(has_gpus=True), Place("cuda", 1, 1.0)),
        ({"device": "cpu"}, Shares(workers_a_node=cores(), has_gpus=True), Place("cpu", 1)),
    ],
)
def test_a_job_is_prepared_where_it_will_run(spec: dict[str, Any], shares: Shares, place: Place) -> None:
    assert need_of(preparing(**spec), shares) == Need(place, None)


def test_needs_take_turns_and_the_urgent_ones_come_first() -> None:
    groups = grouped([job(1, ready=9), job(2, model="b", ready=1), job(3, model="c", ready=3, priority=1)], Shares())
    given = allocate(groups, Room([{"CPU": 8}]).take)
    assert {need.engine.model: n for need, n in given.items() if need.engine} == {"c": 3, "a": 4, "b": 1}
    assert allocate(groups, Room([{"CPU": 8}], most=3).take)[groups[0].need] == 3


def test_a_worker_is_not_spread_over_nodes() -> None:
    """Two nodes with a core left each have no room for a worker of two threads."""
    room = Room([{"CPU": 3}, {"CPU": 3, "GPU": 1}])
    assert [room.take(CPU) for _ in range(3)] == [True, True, False]
    assert [room.take(GPU) for _ in range(2)] == [True, False]


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(0, 2)), max_size=6), st.integers(0, 12))
def test_no_room_is_given_twice_or_left_while_somebody_wants_it(wishes: list[tuple[int, int, int]], cpus: int) -> None:
    jobs = [job(i, model=str(i), ready=n, threads=t, priority=p) for i, (t, n, p) in enumerate(wishes)]
    groups = grouped(jobs, Shares())
    given = allocate(groups, Room([{"CPU": float(cpus)}]).take)
    used = sum(need.place.threads * count for need, count in given.items())
    assert used <= cpus
    for group in groups:
        assert given[group.need] <= group.tasks
        assert given[group.need] == group.tasks or group.need.place.threads > cpus - used


def member(node: str | None = "n1", model: str = "a") -> Member:
    return Member("w@host", SimpleNamespace(), Need(CPU, engine(model)), 0.0, None, node=node)


def test_a_node_that_keeps_killing_workers_is_avoided_until_one_works_there() -> None:
    blame = Blame()
    assert [blame.died(member()) for _ in range(members.NODE_DEATHS)] == [False, False, True]
    assert blame.avoided({"n1", "n2"}) == {"n1"}
    assert blame.avoided({"n1"}) == set(), "there is nowhere else to go"
    assert not blame.died(member()), "it is said once"
    blame.worked(member())
    assert blame.avoided({"n1", "n2"}) == set()


def test_the_pause_before_the_next_try_grows_for_that_need_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(members.time, "monotonic", lambda: now[0])
    blame, pauses = Blame(), []
    for _ in range(9):
        blame.died(member())
        began = now[0]
        while blame.waits(member().need):
            now[0] += 0.25
        pauses.append(now[0] - began)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    blame.died(member())
    assert not blame.waits(member(model="b").need)


def test_workers_may_die_for_a_night(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every half a minute. Red where the pause doubles beyond what a float holds."""
    monkeypatch.setattr(members.time, "monotonic", lambda: 100.0)
    blame = Blame()
    for _ in range(1200):
        blame.died(member())
    assert blame._needs[member().need].until == 100.0 + members.LONGEST_PAUSE_SECONDS


def test_a_node_with_other_weights_is_passed_over_for_that_engine_only() -> None:
    blame = Blame()
    blame.refused(member(), "other weights")
    assert (blame.unfit(engine("a")), blame.unfit(engine("b")), blame.unfit(None)) == ({"n1"}, set(), set())
    assert blame.reasons[engine("a")] == "other weights"
