"""What is measured once per device class, and the kernels that a job was computed with."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from made import claimed, planned_job, results_of

from db import devices, results
from db.devices import Kernels
from db.session import Database, open_database


def choosing(kernel: str):
    """A measurement that finds this kernel the fastest for every shape."""
    return lambda shapes: {shape: [kernel] * 2 for shape in shapes}


def never(_: object = None):
    pytest.fail("measured twice")


def test_the_first_writer_of_a_device_plan_wins(db: Database) -> None:
    """A second worker gets the first one's figures, also where it began to measure before these were written."""
    assert devices.device_plan(db, "cpu", lambda: {"bandwidth": 1}) == {"bandwidth": 1}
    assert devices.device_plan(db, "cpu", never) == {"bandwidth": 1}

    def measure_slowly() -> dict:
        assert devices.device_plan(db, "gpu", lambda: {"bandwidth": 2}) == {"bandwidth": 2}
        return {"bandwidth": 3}

    assert devices.device_plan(db, "gpu", measure_slowly) == {"bandwidth": 2}


def test_only_shapes_that_nobody_has_measured_are_measured(db: Database) -> None:
    """A second model measures what the first one lacks and keeps the rest as it was; the answer is what was asked."""
    assert devices.kernel_plan(db, "cpu", ["2x1", "1x2"], choosing("packed")) == {"1x2": ["packed"] * 2} | {
        "2x1": ["packed"] * 2
    }
    asked: list[str] = []

    def measure(shapes: Sequence[str]) -> Kernels:
        asked.extend(shapes)
        return choosing("columns")(shapes)

    plan = devices.kernel_plan(db, "cpu", ["1x2", "3x3"], measure)
    assert (asked, plan) == (["3x3"], {"1x2": ["packed"] * 2, "3x3": ["columns"] * 2})
    assert devices.kernel_plan(db, "cpu", ["3x3", "1x2"], never) == plan


def test_every_device_class_has_its_own_plan(db: Database) -> None:
    """What is fastest on one processor is not on another."""
    devices.kernel_plan(db, "cpu avx2", ["1x2"], choosing("packed"))
    assert devices.kernel_plan(db, "cpu avx512", ["1x2"], choosing("linear")) == {"1x2": ["linear"] * 2}
    assert devices.kernel_plan(db, "cpu avx2", ["1x2"], never) == {"1x2": ["packed"] * 2}


def test_two_that_measure_at_once_use_one_plan(url: str) -> None:
    """Both workers find nothing, both measure, and both go on with the same kernels: their results are the same bytes.

    They bring the shapes in opposite orders: red (a deadlock on PostgreSQL) without `sorted` in `kernel_plan`.
    """
    shapes = [f"{i}x{i}" for i in range(300)]
    meet = threading.Barrier(2)

    def work(kernel: str) -> Kernels:
        def measure(missing: Sequence[str]) -> Kernels:
            meet.wait(timeout=20)
            return choosing(kernel)(missing)

        with closing(open_database(url)) as db:
            return devices.kernel_plan(db, "cpu", shapes if kernel == "linear" else shapes[::-1], measure)

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(work, ["linear", "packed"])
    assert one == other
    assert list(one) == sorted(shapes)
    assert len({tuple(kernels) for kernels in one.values()}) == 1, "the plan of one writer, whole"


def test_a_job_knows_the_kernels_of_its_results(db: Database) -> None:
    """By device class, of classes that have results; a later note changes nothing, and another job has its own."""
    job_id, other = planned_job(db, 2), planned_job(db, 2)
    lease = claimed(db, job_id=job_id)
    devices.keep_kernels(db, job_id, "cpu-test", {"1x2": ["packed"]})
    devices.keep_kernels(db, job_id, "cpu-test", {"1x2": ["linear"]})
    devices.keep_kernels(db, job_id, "a class that gave up", {"1x2": ["columns"]})
    devices.keep_kernels(db, other, "cpu-test", {"1x2": ["columns"]})
    assert devices.kernels_of(db, job_id) == {}
    results.commit_shard(db, lease, results_of(db, lease))
    assert devices.kernels_of(db, job_id) == {"cpu-test": {"1x2": ["packed"]}}
    assert devices.kernels_of(db, other) == {}
