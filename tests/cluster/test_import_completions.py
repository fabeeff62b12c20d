"""Completions made elsewhere, through the command line: matched, ended and scored as our own, shown beside them."""

import hashlib
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from lines_record import COUNT, prompt
from typer.testing import CliRunner

from cluster import adding, jobs, rescoring
from cluster.cli import app
from cluster.reports.build import build_report
from cluster.reports.page import render_page
from cluster.reports.terminal import render
from db import results
from db.errors import Conflict
from db.session import Database, open_database
from workers.scoring.metrics import score_text


def shortstop(*arguments: str, code: int = 0) -> Any:
    done = CliRunner().invoke(app, [*arguments])
    assert done.exit_code == code, f"{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout) if "--json" in arguments else done.stderr if code else done.stdout


def write(file: Path, *rows: dict[str, Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def by_sample(db: Database, policy: str) -> dict[str, Any]:
    return {row.sample.name: row for row in results.completions(db, job_id=1) if row.policy == policy}


def test_they_stand_beside_ours_with_scores_and_without_times(url: str, tmp_path: Path) -> None:
    """By id and by prompt; ended where the benchmark ends, whatever was written behind."""
    rows: list[dict[str, Any]] = [{"id": f"s{i}", "completion": f" x + {i}\nprint()"} for i in range(4)]
    hashes = [hashlib.sha256(prompt(i).encode()).hexdigest() for i in (4, 5)]
    rows += [{"prompt_sha256": hash, "completion": " x"} for hash in hashes]
    rows += [{"id": "elsewhere", "completion": "x"}]
    file = write(tmp_path / "theirs.jsonl", *rows)
    arguments = ["import-completions", file, "--name", "theirs", "--job", "1", "--database", url]
    done = shortstop(*arguments, "--json")
    assert done == {
        "job": 1,
        "run": "theirs",
        "completions": 6,
        "lacking": 2,
        "left_out": 1,
        "first_left_out": "line 7: elsewhere",
    }
    with closing(open_database(url)) as db:
        found = by_sample(db, "theirs")
        texts = {name: row.outcome.text for name, row in found.items()}
        assert texts == {f"s{i}": f" x + {i}" for i in range(4)} | {"s4": " x", "s5": " x", "s6": None, "s7": None}
        for row in found.values():
            text = row.outcome.text
            expected = {} if text is None else score_text(["em", "es", "accepted"], text, row.sample.reference)
            assert row.scores == expected
        report = build_report(db, 1)
        [benchmark] = report.benchmarks
        theirs = benchmark.runs[-1]
        assert (theirs.policy, theirs.is_imported, theirs.summary.errors) == ("theirs", True, 2)
        assert theirs.summary.speedup_token.value is None
        assert theirs.summary.metric("em").value == pytest.approx(4 / 6)
        assert theirs.summary.metric("token_agreement").value is None
        assert benchmark.runs[0].summary.speedup_ideal is not None
        page = render_page(report)
        assert "theirs was made elsewhere and imported: it has scores, and neither tokens nor times." in page
        assert render(report) is not None
        assert "sha256" in json.dumps(theirs.options)
    printed = shortstop("report", "1", "--database", url)
    assert "theirs was made elsewhere" in " ".join(printed.split())
    assert shortstop("db", "check", "--database", url)
    again = shortstop(*arguments, code=2)
    assert "job 1 has a run 'theirs' already; give the new one another name." in again


def test_scores_of_theirs_can_be_renewed_and_a_policy_added(url: str, tmp_path: Path) -> None:
    """Scored again the same comes out; what is compared with full depth, token by token, is not made up."""
    file = write(tmp_path / "theirs.jsonl", *({"id": f"s{i}", "completion": f" x + {i}"} for i in range(COUNT)))
    shortstop("import-completions", file, "--name", "theirs", "--job", "1", "--database", url)
    with closing(open_database(url)) as db:
        before = {name: row.scores for name, row in by_sample(db, "theirs").items()}
        rescoring.rescore(db, 1)
        assert {name: row.scores for name, row in by_sample(db, "theirs").items()} == before
        adding.add_policy(db, 1, {"fixed": {"exit_layer": 2}})
        assert jobs.work(db, 1, inline=True) is jobs.JobState.DONE
        assert {name: row.scores for name, row in by_sample(db, "theirs").items()} == before
        assert len(build_report(db, 1).runs) == 4
    assert shortstop("db", "check", "--database", url)


def test_without_a_job_they_become_one(url: str, tmp_path: Path) -> None:
    """No model, no times; another run comes beside it, a policy of ours cannot."""
    file = write(tmp_path / "theirs.jsonl", *({"id": f"s{i}", "completion": f" x + {i}"} for i in range(COUNT)))
    benchmark = f"{{jsonl: {tmp_path / 'lines.jsonl'}, id: id, group: file}}"
    arguments = ["import-completions", file, "--database", url]
    done = shortstop(*arguments, "--name", "theirs", "--benchmark", benchmark, "--json")
    assert (done["job"], done["completions"], done["lacking"]) == (2, COUNT, 0)
    shortstop(*arguments, "--name", "others", "--job", "2")
    printed = shortstop("report", "2", "--database", url)
    assert "no model: all completions were made elsewhere" in printed
    with closing(open_database(url)) as db:
        report = build_report(db, 2)
        assert [run.policy for run in report.runs] == ["theirs", "others"]
        assert report.runs[0].summary.metric("em").value == 1
        assert "theirs" in render_page(report)
        with pytest.raises(Conflict, match="job 2 has no model, only completions that were imported"):
            adding.add_policy(db, 2, "full")
    assert "theirs" in shortstop("show", "2", "--database", url)
    assert shortstop("list", "--database", url)
    assert shortstop("db", "check", "--database", url)


def test_hostile_completions_fail_their_tests_and_the_others_pass(url: str, tmp_path: Path) -> None:
    """`pass@1` of a whole job goes on past what wants to harm it."""
    try:
        from workers.execution.sandbox import check_sandbox

        check_sandbox()
    except Exception as reason:
        pytest.skip(str(reason))
    bodies = [
        " x + 0",
        " [__import__('os').fork() for _ in range(10**6)]",
        " [bytearray(10**8) for _ in range(10**6)]",
        " __import__('os').kill(__import__('os').getppid(), 9)",
        f" open({str(tmp_path / 'written')!r}, 'w').write('x') and 1",
        " __import__('socket').create_connection(('127.0.0.1', 80))",
        " x + int(__import__('os').environ['PATH'] != '') + 5",
        " x + 7",
    ]
    file = write(tmp_path / "theirs.jsonl", *({"id": f"s{i}", "completion": body} for i, body in enumerate(bodies)))
    shortstop("import-completions", file, "--name", "theirs", "--job", "1", "--database", url)
    shortstop("rescore", "1", "--metric", "pass@1", "--execute", "--database", url)
    with closing(open_database(url)) as db:
        passed = {name: row.scores["pass@1"] for name, row in by_sample(db, "theirs").items()}
    assert passed == {f"s{i}": float(i in (0, 7)) for i in range(COUNT)}
    assert not (tmp_path / "written").exists()


WRONG: list[tuple[list[dict[str, Any]] | str, str]] = [
    ("", "holds none; write a JSON object a line"),
    ("{\n", "line 1: it is not JSON"),
    ("[1]\n", "line 1: it is no JSON object"),
    (
        [{"id": "s1", "completions": "x"}],
        "line 1: field 'completion' is missing (did you mean 'completions'); name it so.",
    ),
    ([{"completion": "x"}], "line 1: give the sample's 'id', or 'prompt_sha256', and not both."),
    ([{"id": "s1", "completion": 3}], "line 1: field 'completion' is a int, not text; correct it."),
    ([{"id": "s1", "completion": None}], "line 1: field 'completion' is null; leave the line out"),
    ([{"id": "s1", "completion": "a\0b"}], "line 1: field 'completion' holds a NUL"),
    (
        [{"id": "s1", "completion": "a"}, {"id": "s1", "completion": "b"}],
        "line 2: id 's1' has a completion on line 1 already",
    ),
    ([{"id": "sample1", "completion": "a"}], "line 1: id 'sample1' is of no sample of job 1, nor is any other;"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_what_is_wrong_is_told_with_its_line(url: str, tmp_path: Path, case: int) -> None:
    content, sentence = WRONG[case]
    file = tmp_path / "theirs.jsonl"
    if isinstance(content, str):
        file.write_text(content)
    else:
        write(file, *content)
    told = shortstop("import-completions", str(file), "--name", "theirs", "--job", "1", "--database", url, code=2)
    assert sentence in told
    assert len(told.splitlines()) == 1
    with closing(open_database(url)) as db:
        assert by_sample(db, "theirs") == {}


def test_a_job_or_a_benchmark_and_a_name(url: str, tmp_path: Path) -> None:
    file = write(tmp_path / "theirs.jsonl", {"id": "s1", "completion": "x"})
    for options, sentence in (
        ([], "give --job JOB, whose samples were completed, or --benchmark"),
        (["--job", "1", "--benchmark", "humaneval-lines"], "and not both"),
        (["--benchmark", "{"], "is not YAML"),
        (["--benchmark", "humaneval-linse"], "humaneval-lines"),
        (["--benchmark", "{source: json, task: random-cut}"], "cut by a model's tokens"),
        (["--job", "9"], "job 9 does not exist"),
    ):
        assert sentence in shortstop("import-completions", file, "--name", "x", *options, "--database", url, code=2)
    told = shortstop("import-completions", file, "--name", "full", "--job", "1", "--database", url, code=2)
    assert "cannot be that of a run made elsewhere" in told
