"""`shortstop benchmarks overlap`: flags are kept with the samples, and a report shows their scores apart."""

import io
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console
from small_world import World
from typer.testing import CliRunner, Result

from cluster import jobs
from cluster.cli import app
from cluster.reports.build import build_report
from cluster.reports.model import JobReport
from cluster.reports.page import render_page
from cluster.reports.terminal import print_report
from cluster.spec import parse_job
from db import jobs as kept_jobs
from db import overlaps
from db.session import Database, open_database


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["benchmarks", "overlap", *arguments])


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'own.db'}"


@pytest.fixture
def db(url: str) -> Iterator[Database]:
    with closing(open_database(url)) as database:
        yield database


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(8):
        lines = [f"a{number}_{i} = b{number}(c{number}, {i}) + d{number}(e{number}, 1) * f{number}" for i in range(4)]
        (folder / f"part{number}.py").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def corpus(source: Path, tmp_path: Path) -> Path:
    """Has one of the source's files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "copied.txt").write_text((source / "part3.py").read_text())
    return folder


@pytest.mark.parametrize("store_text", [True, False])
def test_flags_are_kept_and_reported_apart(
    world: World, source: Path, corpus: Path, db: Database, url: str, store_text: bool
) -> None:
    """By the job's number, also where the record has no texts; again gives the same; another corpus stands beside."""
    asked = {"source": str(source), "store_text": store_text}
    job = jobs.submit(db, parse_job(world.fields(benchmarks=[asked], policies=["full"], metrics=["em", "es"])))
    assert jobs.work(db, job, inline=True) is jobs.JobState.DONE
    assert build_report(db, job).benchmarks[0].overlap is None
    for _ in range(2):
        done = call(str(job), str(corpus), "wsgiref", "--database", url, "--json")
        assert done.exit_code == 0, done.stderr
        found, other = json.loads(done.stdout)
        assert (found["kept"], len(found["overlap"]["flagged"]), other["overlap"]["flagged"]) == (True, 3, [])
    rows = overlaps.of_benchmark(db, kept_jobs.runs(db, job)[0].benchmark_id)
    assert [row.corpus for row in rows[0]] == [str(corpus), "wsgiref"]
    assert {row.found_in for row in rows[1]} == {"copied.txt"}
    report = build_report(db, job)
    apart = report.benchmarks[0].overlap
    assert apart is not None
    assert (apart.flagged, apart.judged, len(apart.runs)) == (3, 24, 1)
    means = (apart.runs[0].flagged["es"].value, apart.runs[0].others["es"].value)
    whole = report.runs[0].summary.metric("es").value
    assert whole is not None
    assert (3 * (means[0] or 0) + 21 * (means[1] or 0)) / 24 == pytest.approx(whole)
    assert JobReport.model_validate_json(report.model_dump_json()) == report
    shown = io.StringIO()
    print_report(report, Console(file=shown))
    assert "3 of 24 samples stand in" in " ".join(shown.getvalue().split())
    assert "in the corpus" in shown.getvalue()
    assert "in a corpus" in render_page(report)


def test_a_benchmark_that_no_job_has_is_looked_for_and_not_kept(source: Path, corpus: Path, tmp_path: Path) -> None:
    """No database is made for it; one sentence says that the flags are not kept."""
    file = tmp_path / "none.db"
    done = call(f"{{source: {source}}}", str(corpus), "--database", f"sqlite:///{file}")
    assert done.exit_code == 0, done.stderr
    assert "its flags are not kept" in " ".join(done.stdout.split())
    assert "part3.py:2: " in done.stdout
    assert not file.exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["7", "json"], "does not exist"),
        (["humaneval-line", "json"], "did you mean 'humaneval-lines'"),
        (["{source: json, task: random-cut}", "json"], "is cut by a model's tokens; name a job that has it"),
        (["{source: json}", "no_such_package"], "corpus 'no_such_package': there is no such folder"),
        (["{source: [}", "json"], "is no mapping; write one as in a spec"),
    ],
)
def test_what_cannot_be_looked_for_is_one_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    done = call(*arguments, "--database", f"sqlite:///{tmp_path / 'none.db'}")
    assert done.exit_code == 2
    assert sentence in done.stderr
