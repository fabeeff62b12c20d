"""What only SQLite has: a file, a folder, one writer at a time."""

import multiprocessing
import os
import sqlite3
from pathlib import Path

import pytest
from made import claimed, planned_job, results_of

from db import jobs, queue, results, session
from db.errors import BadInput, Unavailable
from db.session import Database, open_database

#: processes of their own, forked from one that has imported the record: quick, and free of pytest's threads
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["db.results", "alembic.command", "pytest"])


def claim_all(url: str, worker: str, start, found) -> None:
    """Runs in a process of its own."""
    db = open_database(url)
    start.wait(timeout=60)
    while lease := queue.claim(db, worker, kind="shard"):
        found.put(lease.task_id)
    found.put(None)
    db.close()


def test_eight_processes_at_once_never_get_the_same_shard(sqlite_db: Database, sqlite_url: str) -> None:
    """The claim across processes: one statement, one writer at a time, nobody turned away as long as it takes."""
    planned_job(sqlite_db, 120, batch_size=1, shard_batches=1)
    start, found = context.Barrier(8), context.Queue()
    workers = [context.Process(target=claim_all, args=(sqlite_url, f"w{i}", start, found)) for i in range(8)]
    for worker in workers:
        worker.start()
    claimed_ids: list[int] = []
    running = len(workers)
    while running:
        task_id = found.get(timeout=60)
        if task_id is None:
            running -= 1
        else:
            claimed_ids.append(task_id)
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0] * 8
    assert len(claimed_ids) == len(set(claimed_ids)) == 120


def test_a_killed_process_leaves_no_half_commit(sqlite_db: Database, sqlite_url: str) -> None:
    """Killed between its results and its COMMIT, the process leaves the shard as it was; the next one does it."""
    job_id = planned_job(sqlite_db, 2)
    victim = context.Process(target=commit_and_die, args=(sqlite_url,))
    victim.start()
    victim.join(timeout=60)
    assert victim.exitcode == 9
    assert jobs.progress(sqlite_db, job_id).shards == {"leased": 1}
    assert list(results.completions(sqlite_db, job_id=job_id)) == []
    queue.reap(sqlite_db, dead_workers=["victim"])
    lease = claimed(sqlite_db)
    results.commit_shard(sqlite_db, lease, results_of(sqlite_db, lease))
    assert len(list(results.completions(sqlite_db, job_id=job_id))) == 4


def commit_and_die(url: str) -> None:
    """Runs in a process of its own, which ends as if killed when the last rows of the shard are written."""
    db = open_database(url)
    lease = claimed(db, "victim")
    made = results_of(db, lease)

    def die(connection, task_id, rows) -> None:
        os._exit(9)

    results.insert_rollups = die
    results.commit_shard(db, lease, made)


def test_a_locked_file_can_be_tried_again(sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody holds the write lock for longer than the busy timeout: a retryable error of ours."""
    monkeypatch.setattr(session, "BUSY_SECONDS", 0.1)
    db = open_database(sqlite_url)
    planned_job(db, 2)
    other = sqlite3.connect(tmp_path / "record.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match=r"database is locked.*try again") as caught:
        queue.claim(db, "w", kind="shard")
    assert caught.value.retryable
    assert len(jobs.list_jobs(db)) == 1, "reading goes on"
    other.execute("ROLLBACK")
    other.close()
    assert queue.claim(db, "w", kind="shard") is not None
    db.close()


def test_a_full_disk_can_be_tried_again(sqlite_db: Database) -> None:
    """The file may not grow: the commit fails as a whole, and goes through once there is room."""
    job_id = planned_job(sqlite_db, 400, batch_size=100, shard_batches=4)
    lease = claimed(sqlite_db)
    made = results_of(sqlite_db, lease)
    with sqlite_db.read() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(Unavailable, match="full"):
        results.commit_shard(sqlite_db, lease, made)
    assert list(results.completions(sqlite_db, job_id=job_id)) == []
    with sqlite_db.read() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    results.commit_shard(sqlite_db, lease, made)
    assert jobs.progress(sqlite_db, job_id).shards == {"done": 1}


def test_the_settings_that_keep_the_record_safe(sqlite_db: Database) -> None:
    """WAL, so that readers do not wait; foreign keys; NORMAL, which WAL keeps consistent; a wait well under a lease."""
    with sqlite_db.read() as connection:
        found = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "foreign_keys", "synchronous", "busy_timeout")
        ]
    assert found == ["wal", 1, 1, 5000]


def test_the_folder_is_made(tmp_path: Path) -> None:
    open_database(f"sqlite:///{tmp_path / 'new' / 'folder' / 'record.db'}").close()
    assert (tmp_path / "new" / "folder" / "record.db").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInput, match=r"database folder '.*file/below' cannot be written \(.*\); name another one"):
        open_database(f"sqlite:///{tmp_path / 'file' / 'below' / 'record.db'}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(BadInput, match="cannot be"):
        open_database(f"sqlite:///{tmp_path / 'record.db'}")


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("my notes, which are longer than a hundred bytes" * 20)
    with pytest.raises(BadInput, match=r"notes.txt' cannot be used \(file is not a database\)"):
        open_database(f"sqlite:///{tmp_path / 'notes.txt'}")
    assert (tmp_path / "notes.txt").read_text().startswith("my notes")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("record.db", "is no URL; write it like sqlite:///shortstop.db"),
        ("sqlite://", "a record in memory cannot be shared"),
        ("sqlite:///:memory:", "a record in memory cannot be shared"),
        ("mysql://somewhere/record", "'mysql' is not supported; use sqlite:/// or postgresql"),
    ],
)
def test_a_url_that_cannot_be_used_is_explained(url: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        open_database(url)


def test_somebody_elses_file_stays_as_it_is(tmp_path: Path) -> None:
    """Protects `_prepare_file`: the journal mode of a file that is not ours is read, never switched."""
    file = tmp_path / "theirs.db"
    with sqlite3.connect(file) as connection:
        connection.execute("create table t (x)")
    before = file.read_bytes()
    for create in (True, False):
        with pytest.raises(BadInput):
            open_database(f"sqlite:///{file}", create=create)
    assert file.read_bytes() == before
