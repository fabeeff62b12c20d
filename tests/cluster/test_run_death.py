"""The process `shortstop run` dies, or is asked to stop, and `shortstop resume` goes on."""

import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from small_world import World, columns, rows, shortstop, wait_for

from db import jobs as record
from db.session import Database, open_database

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SHORTSTOP_LEASE_SECONDS", "6")
    return f"sqlite:///{tmp_path / 'record.db'}"


@pytest.fixture
def started(world: World, tmp_path: Path, url: str) -> Iterator[tuple[subprocess.Popen[str], Database]]:
    """`shortstop run` with one shard done and the next in hand."""
    yield from _start(world, tmp_path, url)


@pytest.fixture
def started_inline(world: World, tmp_path: Path, url: str) -> Iterator[tuple[subprocess.Popen[str], Database]]:
    yield from _start(world, tmp_path, url, "--inline")


def _start(world: World, folder: Path, url: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], Database]]:
    db = open_database(url)
    process = shortstop("run", str(world.spec_file(folder / "spec.yaml")), "--database", url, *options)
    try:
        wait_for("a shard done and a batch of the next", lambda: process.poll() is not None or _in_the_middle(db))
        assert process.poll() is None, process.communicate()[1]
        yield process, db
    finally:
        process.kill()
        process.communicate()
        db.close()


def _in_the_middle(db: Database) -> bool:
    done = rows(db, "select count(*) from task where kind = 'shard' and state = 'done'")
    begun = rows(db, "select count(*) from task where kind = 'shard' and state = 'leased' and done_batches >= 1")
    return done >= [(1,)] and begun >= [(1,)]


def test_kill_9_of_the_run_then_resume(
    started: tuple[subprocess.Popen[str], Database], url: str, undisturbed: dict[tuple[str, str], tuple[object, ...]]
) -> None:
    process, db = started
    left_behind = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert record.job(db, 1).state is record.JobState.RUNNING
    resume = shortstop("resume", "1", "--database", url)
    _, said = resume.communicate(timeout=240)
    assert resume.returncode == 0, said
    assert record.job(db, 1).state is record.JobState.DONE
    assert columns(db, 1) == undisturbed
    assert rows(db, "select max(deaths), max(attempt) from task") == [(0, 1)], "the run's death is not the shard's"
    wait_for("Ray's processes to follow their run", lambda: not any(child.is_running() for child in left_behind))


def test_a_run_that_is_interrupted_gives_its_leases_back(started: tuple[subprocess.Popen[str], Database]) -> None:
    process, db = started
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert rows(db, "select count(*) from task where state = 'leased'") == [(0,)]
    assert rows(db, "select max(deaths), max(attempt) from task") == [(0, 1)]
    assert re.search(r"shortstop resume 1 --database \S+record.db", said)


def test_an_inline_run_that_is_terminated_gives_its_lease_back(
    started_inline: tuple[subprocess.Popen[str], Database],
    url: str,
    undisturbed: dict[tuple[str, str], tuple[object, ...]],
) -> None:
    """What was finished of the shard in hand is kept: the lease is split, not dropped."""
    process, db = started_inline
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert rows(db, "select count(*) from task where state = 'leased'") == [(0,)]
    assert rows(db, "select count(*) from task where state = 'split'") == [(1,)]
    resume = shortstop("resume", "1", "--database", url, "--inline")
    _, said = resume.communicate(timeout=240)
    assert resume.returncode == 0, said
    assert columns(db, 1) == undisturbed
