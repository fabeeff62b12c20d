"""`shortstop db backup`: one file, one moment, while workers write; PostgreSQL's own tool is named."""

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from made import planned_job, work
from test_checks import HASHES

from db import jobs, results
from db.backup import backup
from db.checks import check
from db.errors import BadInput
from db.session import Database, open_database

#: a worker in a process of its own, which commits shards until nothing is ready
WORKER = """
import sys
from made import work
from db.session import open_database
print("ready", flush=True)
work(open_database(sys.argv[1]))
"""


def test_a_backup_taken_while_a_worker_writes_is_one_moment(
    sqlite_db: Database, sqlite_url: str, tmp_path: Path
) -> None:
    """Shards in it are whole, `db check` finds nothing, and work goes on from it."""
    job_id = planned_job(sqlite_db, 600, batch_size=2, shard_batches=2)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, sqlite_url], stdout=subprocess.PIPE, env=environment, text=True
    )
    assert worker.stdout is not None
    worker.stdout.readline()
    copies: list[Path] = []
    while worker.poll() is None:
        if jobs.progress(sqlite_db, job_id).shards.get("done", 0) >= 50 * len(copies):
            copies.append(tmp_path / f"copy{len(copies)}.db")
            backup(sqlite_db, copies[-1])
    worker.stdout.close()
    assert worker.returncode == 0
    done = []
    for file in copies:
        with closing(open_database(f"sqlite:///{file}", create=False)) as copy:
            assert list(check(copy, HASHES)) == []
            done.append(jobs.progress(copy, job_id).shards.get("done", 0))
    assert done == sorted(done)
    assert len(set(done)) > 1, "copies were taken while the worker wrote"
    with closing(open_database(f"sqlite:///{copies[0]}")) as copy:
        work(copy)
        assert jobs.finished(copy, job_id)
        assert list(check(copy, HASHES)) == []


def test_a_backup_holds_what_the_log_holds(sqlite_db: Database, tmp_path: Path) -> None:
    """What is committed and still in the write-ahead log is in the copy, a transaction under way is not."""
    job_id = planned_job(sqlite_db, 8)
    work(sqlite_db)
    with sqlite_db.write() as connection:
        connection.exec_driver_sql("UPDATE job SET name = 'half done'")
        backup(sqlite_db, tmp_path / "copy.db")
    with closing(open_database(f"sqlite:///{tmp_path / 'copy.db'}")) as copy:
        assert jobs.job(copy, job_id).name == "made"
        assert len(list(results.completions(copy, job_id=job_id))) == 16
    assert sorted(file.name for file in tmp_path.iterdir() if "copy" in file.name) == ["copy.db"]


def test_a_file_that_is_there_is_not_overwritten(sqlite_db: Database, tmp_path: Path) -> None:
    file = tmp_path / "copy.db"
    file.write_text("precious")
    with pytest.raises(BadInput, match=r"copy.db' is there already; remove it, or give the backup another name"):
        backup(sqlite_db, file)
    assert file.read_text() == "precious"


def test_a_backup_that_fails_leaves_nothing(
    sqlite_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the file nor a part of it."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BadInput, match="a backup cannot be written there; name another"):
        backup(sqlite_db, tmp_path / "nowhere" / "copy.db")

    def rename(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        backup(sqlite_db, tmp_path / "copy.db")
    assert sorted(tmp_path.iterdir()) == before


def test_two_backups_to_one_file_give_one(sqlite_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second finds the first's file when it is about to take its name."""
    copied = sqlite3.Connection

    class Meanwhile(copied):
        def backup(self, *arguments: object, **options: object) -> None:
            super().backup(*arguments, **options)
            (tmp_path / "copy.db").write_text("precious")

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **o: connect(*a, **{"factory": Meanwhile} | o))
    with pytest.raises(BadInput, match="is there already"):
        backup(sqlite_db, tmp_path / "copy.db")
    assert (tmp_path / "copy.db").read_text() == "precious"


def test_on_postgresql_the_command_is_named_and_does_it(
    postgresql_db: Database, empty_postgresql_url: str, tmp_path: Path
) -> None:
    """What the sentence says, run as it stands, and restored."""
    job_id = planned_job(postgresql_db, 8)
    work(postgresql_db)
    with pytest.raises(BadInput) as caught:
        backup(postgresql_db, tmp_path / "copy")
    command = str(caught.value).split("`")[1]
    assert command.startswith(f"pg_dump --format=custom --file={tmp_path / 'copy'} ")
    with postgresql_db.read() as connection:
        tools = connection.exec_driver_sql("SELECT setting FROM pg_config WHERE name = 'BINDIR'").scalar_one()
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    assert shutil.which("pg_dump", path=environment["PATH"])
    subprocess.run(command, shell=True, check=True, env=environment)
    target = empty_postgresql_url.replace("postgresql+psycopg", "postgresql")
    subprocess.run(["pg_restore", f"--dbname={target}", str(tmp_path / "copy")], check=True, env=environment)
    with closing(open_database(empty_postgresql_url, create=False)) as copy:
        assert list(check(copy, HASHES)) == []
        assert len(list(results.completions(copy, job_id=job_id))) == 16
