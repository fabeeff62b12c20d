"""Database files that older versions wrote: refused, brought up to date, and then as good as new."""

import json
import lzma
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from served import serving
from typer.testing import CliRunner, Result

from cluster.cli import app

FROZEN = Path(__file__).parents[1] / "frozen"
RECORDS = sorted(FROZEN.glob("record-*.db.xz"))
POLICIES = ["full", "confidence threshold=0.6", "patience kv=recompute patience=1", "sec on_stop=suppress"]
#: what must be after an upgrade as it was before
KEPT = (
    "SELECT id, run_id, sample_id, task_id, text, error, finish, n_tokens, shown, tokens FROM outcome ORDER BY id",
    "SELECT * FROM score ORDER BY 1, 2, 3, 4",
    "SELECT run_id, batch, prefill_ns, decode_ns, timed FROM timing ORDER BY 1, 2",
    "SELECT id, policy, summary FROM run ORDER BY id",
    "SELECT id, benchmark_id, position, name, prompt, reference, language, source_group FROM sample ORDER BY id",
    "SELECT hash, content FROM artifact",
)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answered(*arguments: object) -> Any:
    done = call(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(params=RECORDS, ids=lambda path: path.name)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    thawed = tmp_path / "record.db"
    thawed.write_bytes(lzma.decompress(request.param.read_bytes()))
    return thawed


def rows(file: Path, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(file)) as connection:
        return connection.execute(sql).fetchall()


def kept(file: Path) -> list[list[tuple[Any, ...]]]:
    return [rows(file, sql) for sql in KEPT]


def revision(file: Path) -> str:
    [(number,)] = rows(file, "SELECT version_num FROM alembic_version")
    return str(number)


def test_there_are_frozen_records() -> None:
    """The oldest schema, and small: they come with every clone."""
    assert {"record-0001.db.xz", "record-0003.db.xz"} <= {path.name for path in RECORDS}
    assert all(path.stat().st_size < 200_000 for path in RECORDS)


def test_an_old_record_is_refused_until_it_is_brought_up_to_date(file: Path) -> None:
    """One sentence with the command that helps, and nothing changed."""
    url, before = f"sqlite:///{file}", file.read_bytes()
    refused = call("report", 1, "--database", url)
    assert refused.exit_code == 2
    assert f"has schema {revision(file)}, this version needs" in refused.stderr
    assert "run `shortstop db upgrade` first" in refused.stderr
    assert file.read_bytes() == before


def test_an_old_record_is_as_good_as_new_after_an_upgrade(file: Path, tmp_path: Path) -> None:
    """Upgraded, checked, reported, asked, and moved into a record of today."""
    database, before = ("--database", f"sqlite:///{file}"), kept(file)
    assert call("db", "upgrade", *database).exit_code == 0
    assert kept(file) == before
    checked = call("db", "check", *database)
    assert checked.exit_code == 0, checked.stdout
    report = answered("report", 1, *database)
    [benchmark] = report["benchmarks"]
    assert [run["policy"][: len(name)] for run, name in zip(benchmark["runs"], POLICIES, strict=True)] == POLICIES
    counted = "SELECT decision, count(*) AS n, count(draft_layer) AS drafts FROM token GROUP BY 1 ORDER BY 1"
    answers = answered("query", counted, *database)
    assert [tuple(row.values()) if isinstance(row, dict) else tuple(row) for row in answers] == [
        ("exit", 138, 0),
        ("full", 521, 0),
        ("stop", 20, 0),
    ]
    assert call("export", 1, tmp_path / "exported", *database).exit_code == 0
    other = ("--database", f"sqlite:///{tmp_path / 'other.db'}")
    assert call("import", tmp_path / "exported", *other).exit_code == 0
    assert call("db", "check", *other).exit_code == 0
    assert answered("query", counted, *other) == answers


def test_its_pages_are_shown(file: Path, tmp_path: Path) -> None:
    """Also where its jobs say nothing of what specs can say since."""
    url = f"sqlite:///{file}"
    assert call("db", "upgrade", "--database", url).exit_code == 0
    with serving(url, tmp_path / "uploads") as served:
        for page in ("/", "/jobs/1", "/jobs/1?save=1", "/jobs/1/completions", "/compare?b=1", "/system"):
            assert served.ask("GET", page).status_code == 200, page
        [(sample,)] = rows(file, "SELECT min(id) FROM sample")
        assert served.ask("GET", f"/jobs/1/completions/{sample}").status_code == 200
        assert served.ask("GET", "/v1/jobs/1/report?format=html").status_code == 200
