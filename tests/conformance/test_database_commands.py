"""`db check`, `db prune`, `db backup`, `export` and `import` as a user has them, with the hashes of the house."""

import io
import json
import re
import shlex
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from made import planned_benchmark, planned_policy, summarise, work
from sqlalchemy import text
from typer.testing import CliRunner, Result

from cluster.cli import app
from cluster.contents import hashes
from db import jobs, queue, results
from db.session import Database, open_database
from workers.benchmarks.sample import Benchmark, Sample
from workers.bundle import pack, packed_hash

PAGE = (Path(__file__).parents[2] / "docs" / "database.md").read_text()


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answered(*arguments: object, code: int = 0) -> Any:
    done = call(*arguments, "--json")
    assert done.exit_code == code, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def bundle(tmp_path: Path) -> bytes:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "exits.json").write_text("{}")
    (folder / "exits.safetensors").write_bytes(b"weights")
    return pack(folder)


@pytest.fixture
def done(db: Database, bundle: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Database:
    """A finished job whose content has the hashes that `cluster.prepare` gives it; commands find it by the settings."""
    made = planned_benchmark(11)
    content = Benchmark("lines", "1", "line", [Sample(*fields) for fields in made.samples]).content_hash
    job_id = jobs.create_job(db, name="made", spec={"model": "none"})
    lease = queue.claim(db, "preparer", kind="prepare", job_id=job_id)
    assert lease is not None
    jobs.plan_job(
        db,
        lease,
        pinned={"batch_size": 2, "shard_batches": 2, "n_layers": 30, "exits_hash": packed_hash(bundle)},
        benchmarks=[type(made)("lines", "1", content, "line", made.samples)],
        artifacts=[("exits", packed_hash(bundle), bundle)],
        policies=[planned_policy("full"), planned_policy("patience patience=2")],
    )
    work(db)
    results.finalise(db, job_id, summarise)
    monkeypatch.setenv("SHORTSTOP_DATABASE_URL", db.url)
    monkeypatch.chdir(tmp_path)
    return db


def test_the_documented_commands_run_as_written(done: Database, tmp_path: Path) -> None:
    """docs/database.md, top to bottom; a backup of PostgreSQL is told to use its own tool."""
    blocks = "".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL))
    commands = [shlex.split(line, comments=True) for line in blocks.splitlines()]
    assert len(commands) == 7
    for program, *arguments in commands:
        assert program == "shortstop"
        ended = call(*arguments)
        if "backup" in arguments and done.dialect == "postgresql":
            assert (ended.exit_code, "`pg_dump --format=custom --file=record-backup.db" in ended.stderr) == (2, True)
        else:
            assert ended.exit_code == 0, ended.stderr
    [python] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(python, {})
    assert [one.id for one in jobs.list_jobs(done)] == [2, 1]


def test_the_files_of_an_export_are_documented(done: Database, tmp_path: Path) -> None:
    call("export", 1, "exported")
    assert [file.name for file in (tmp_path / "exported").iterdir() if f"`{file.name}`" not in PAGE] == []


def test_check_ends_with_1_where_there_is_a_violation(done: Database) -> None:
    assert call("db", "check").stdout == "no violations\n"
    assert answered("db", "check") == {"violations": []}
    with done.write() as connection:
        connection.execute(text("UPDATE rollup SET tokens = tokens + 1 WHERE run_id = 1"))
        connection.execute(text("UPDATE sample SET prompt = 'other' WHERE position = 1"))
        connection.execute(text("UPDATE artifact SET hash = 'another'"))
    found = answered("db", "check", code=1)["violations"]
    assert [sentence.split(" ")[0] for sentence in found] == ["job", "benchmark", "artifact", *["run"] * 3]
    told = call("db", "check")
    assert (told.exit_code, told.stdout.splitlines()) == (1, found)
    rebuilt = answered("db", "check", "--rebuild-rollups", code=1)
    assert (rebuilt["rebuilt"], rebuilt["violations"]) == (3, found[:3])


def test_an_archive_that_is_none_has_no_hash(done: Database, bundle: bytes) -> None:
    """Neither bytes that are no archive, nor one without the bundle's files, nor a bundle with another byte."""
    empty = io.BytesIO()
    tarfile.open(fileobj=empty, mode="w").close()
    assert hashes().artifact("exits", bundle) == packed_hash(bundle)
    for damaged in (b"", b"x" * 600, empty.getvalue(), bundle[:700], bundle.replace(b"weights", b"Weights")):
        assert hashes().artifact("exits", damaged) != packed_hash(bundle)


def test_prune_tells_what_goes(done: Database) -> None:
    with done.write() as connection:
        connection.execute(text("UPDATE job SET finished_at = finished_at - 7200"))
    assert answered("db", "prune", "--older-than", "3h")["jobs"] == []
    line = "1 jobs (1), 22 outcomes, 1 benchmarks, 11 samples, 1 artifacts\n"
    assert call("db", "prune", "--older-than", "1h", "--dry-run").stdout == f"would remove: {line}"
    assert jobs.job(done, 1).state is jobs.JobState.DONE
    removed = call("db", "prune", "--older-than", "90m")
    assert (removed.stdout, removed.stderr) == (f"removed: {line}", "job 1: removed\n")
    assert jobs.list_jobs(done) == []


@pytest.mark.parametrize("age", ["30", "d", "-1d", "1.5d", "30 days", "1y", ""])
def test_an_age_that_is_none_is_refused(done: Database, age: str) -> None:
    ended = call("db", "prune", "--older-than", age)
    assert (ended.exit_code, "is no age; write a number and s, m, h, d or w, like 30d." in ended.stderr) == (2, True)
    assert len(jobs.list_jobs(done)) == 1


def test_export_and_import_answer_in_json(done: Database, tmp_path: Path) -> None:
    id = answered("export", 1, "exported")["export"]
    assert re.fullmatch("[0-9a-f]{64}", id)
    target = f"sqlite:///{tmp_path / 'other.db'}"
    assert answered("import", "exported", "--database", target) == {"job": 1, "new": True}
    assert answered("import", "exported", "--database", target) == {"job": 1, "new": False}
    assert answered("db", "check", "--database", target) == {"violations": []}
    with closing(open_database(target)) as other:
        assert len(list(results.completions(other, job_id=1))) == 22
    refused = call("import", tmp_path, "--database", target)
    assert (refused.exit_code, "holds no manifest.json" in refused.stderr) == (2, True)


def test_an_import_of_nothing_makes_no_database(tmp_path: Path) -> None:
    """Protects folders: what is refused leaves nothing behind."""
    file = tmp_path / "record.db"
    done = call("import", tmp_path / "nowhere", "--database", f"sqlite:///{file}")
    assert done.exit_code == 2
    assert "manifest.json" in done.stderr
    assert not file.exists()
