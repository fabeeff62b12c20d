"""A record on a disk that is full: a clear sentence, nothing lost, and work goes on once there is space."""

import os
import re
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path

import faults
import pytest
from faults import assert_as_undisturbed, commit, planned, work_off
from made import claimed
from own_server import Server
from sqlalchemy import text

from db import jobs, results
from db.errors import Unavailable
from db.queue import Lease
from db.session import Database, open_database

N_SAMPLES = 400
#: of PostgreSQL's server: its tables and its log are 60 MB before anything is in them
SERVER_MB = 160
NO_SPACE = r"database sqlite:///\S+/record.db has no space left \(database or disk is full\); make room and try again\."
TOO_LARGE = r"database sqlite:///\S+/record.db is busy or out of reach \(disk I/O error\); try again\."
#: what PostgreSQL says of its file differs
NO_SPACE_FOR_A_TABLE = r"database \S+ has no space left \(.*No space left on device\); make room and try again\."


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of two megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or mount(folder, "size=2m").returncode != 0:
        pytest.skip("only root may mount a small disk; the test with a limit on files needs none")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mount(folder: Path, options: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)


def test_a_full_disk(small_disk: Path) -> None:
    """ENOSPC from a real file system."""

    def make_room() -> None:
        assert mount(small_disk, "remount,size=64m").returncode == 0

    fill_and_go_on(f"sqlite:///{small_disk / 'record.db'}", NO_SPACE, lambda _: None, make_room)


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """EFBIG, as from a quota, in a process of its own: pytest has files to write as well."""
    assert faults.exit_code(limit_and_go_on, tmp_path / "record.db") == 0


def limit_and_go_on(file: Path) -> None:
    """Runs in a process of its own."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def take_room(_: Database) -> None:
        log = file.with_name("record.db-wal").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (log + 500_000, unlimited[1]))

    url = f"sqlite:///{file}"
    fill_and_go_on(url, TOO_LARGE, take_room, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, unlimited))


@pytest.fixture
def server(small_disk: Path) -> Iterator[Server]:
    """A PostgreSQL server that has nothing but the small disk, made large enough for it to start."""
    assert mount(small_disk, f"remount,size={SERVER_MB}m").returncode == 0
    server = Server(small_disk / "server")
    server.start()
    yield server
    server.kill()


def fill(disk: Path, left: int) -> None:
    """With zeros, but for so many bytes."""
    free = os.statvfs(disk)
    with (disk / "filler").open("wb") as filler:
        filler.write(bytes(free.f_bavail * free.f_frsize - left))


def test_no_room_for_a_table_of_postgresql(small_disk: Path, server: Server) -> None:
    """ENOSPC from a real file system. The server goes on, and what it holds can be read."""

    def take_room(db: Database) -> None:
        with db.read() as connection:
            connection.execute(text("SELECT pg_switch_wal()"))  # its log has room in a file of its own
        with db.write() as connection:
            connection.execute(text("SELECT pg_logical_emit_message(true, 'a', 'record that makes it')"))
        fill(small_disk, left=200_000)

    fill_and_go_on(server.url, NO_SPACE_FOR_A_TABLE, take_room, (small_disk / "filler").unlink)


def test_no_room_for_the_log_of_postgresql(small_disk: Path, server: Server) -> None:
    """It cannot begin the next file. Whether it goes on or dies of it, nothing is missing once it is started again."""
    with closing(open_database(server.url)) as db:
        job_id = planned(db, N_SAMPLES, shard_batches=10)
        commit(db, claimed(db))
        fill(small_disk, left=200_000)
        lease, done, said = commit_until_full(db, lambda: next_file_of_the_log(db))
        assert re.fullmatch(r"database \S+ (has no space left|is busy or out of reach) .*try again\.", said), said
        assert "No space left on device" in server.log()
        (small_disk / "filler").unlink()
        server.kill()
        server.start()
        assert jobs.progress(db, job_id).shards["done"] >= 1 + done
        if lease is not None:
            commit(db, lease)
        work_off(db, job_id)
        assert_as_undisturbed(db, job_id, N_SAMPLES)


def next_file_of_the_log(db: Database) -> None:
    """What would take sixteen megabytes of work."""
    with db.read() as connection:
        connection.execute(text("SELECT pg_switch_wal()"))


def fill_and_go_on(
    url: str, sentence: str, take_room: Callable[[Database], None], make_room: Callable[[], object]
) -> None:
    """Whoever found no space repeats what it did; whoever comes by meanwhile finds the record whole."""
    with closing(open_database(url)) as db:
        job_id = planned(db, N_SAMPLES, shard_batches=10)
        take_room(db)
        lease, done, said = commit_until_full(db)
        assert re.fullmatch(sentence, said), said
        assert done > 0
        with closing(open_database(url)) as other:
            assert jobs.progress(other, job_id).shards["done"] == done
            assert len(list(results.completions(other, job_id=job_id))) == done * 20 * len(faults.POLICIES)
            faults.assert_rollups_equal_a_recount(other, job_id)
        make_room()
        if lease is not None:
            commit(db, lease)
        work_off(db, job_id)
        assert_as_undisturbed(db, job_id, N_SAMPLES)


def commit_until_full(db: Database, before_each: Callable[[], None] = lambda: None) -> tuple[Lease | None, int, str]:
    """The shard that could not be committed, if it could be claimed; how many were before it; what was said."""
    for done in count():
        lease = None
        try:
            before_each()
            lease = claimed(db)
            commit(db, lease)
        except Unavailable as error:
            return lease, done, str(error)
    raise AssertionError
