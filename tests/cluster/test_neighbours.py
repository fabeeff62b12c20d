"""Exports that neighbours read: held against their own schema and their own reader."""

import json
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from lines_record import COUNT
from typer.testing import CliRunner

from cluster.cli import app
from cluster.reports.build import build_report
from db import results
from db.session import open_database


def shortstop(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, [*arguments])
    assert done.exit_code == code, f"{done.stdout}\n{done.stderr}"
    return done.stderr if code else done.stdout


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def with_theirs(url: str, tmp_path: Path) -> str:
    """The job with one run more, which lacks a completion."""
    file = tmp_path / "theirs.jsonl"
    rows = ({"id": f"s{i}", "completion": f" x + {i} é"} for i in range(COUNT - 1))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shortstop("import-completions", str(file), "--name", "org/their model", "--job", "1", "--database", url)
    return url


def test_samples_of_the_harness(with_theirs: str, tmp_path: Path) -> None:
    """A folder a policy, a line a completion, with the fields and hashes that the harness writes."""
    folder = tmp_path / "harness"
    told = json.loads(shortstop("export", "1", str(folder), "--format", "lm-eval", "--json", "--database", with_theirs))
    assert (told["files"], told["completions"]) == (3, 3 * COUNT - 1)
    files = sorted(folder.rglob("*.jsonl"))
    assert len({file.parent for file in files}) == 3
    assert all(file.name.startswith("samples_") for file in files)
    with closing(open_database(with_theirs)) as db:
        rows = [row for row in results.completions(db, job_id=1) if row.outcome.text is not None]
    written = [line for file in files for line in lines(file)]
    by_text = sorted((row.sample.position, row.outcome.text, sorted(row.scores.items())) for row in rows)
    assert by_text == sorted(
        (line["doc_id"], line["resps"][0][0], sorted((name, line[name]) for name in line["metrics"]))
        for line in written
    )
    if find_spec("lm_eval"):
        from lm_eval.utils import hash_string

        for line in written:
            assert line["prompt_hash"] == hash_string(line["arguments"]["gen_args_0"]["arg_0"])
            assert line["target_hash"] == hash_string(line["target"])
            assert line["doc_hash"] == hash_string(json.dumps(line["doc"], indent=2, ensure_ascii=False))
    refused = shortstop("export", "1", str(folder), "--format", "lm-eval", "--database", with_theirs, code=2)
    assert "is there already" in refused


def test_records_of_every_eval_ever(with_theirs: str, tmp_path: Path) -> None:
    """Valid by the published schemas; results and records say what the report and the completions say."""
    pytest.importorskip("every_eval_ever", reason="the package every-eval-ever carries the schemas")
    spec = find_spec("every_eval_ever")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    schemas = Path(spec.submodule_search_locations[0]) / "schemas"
    of_run, of_sample = (
        Draft7Validator(json.loads((schemas / f"{name}.schema.json").read_text()))
        for name in ("eval", "instance_level_eval")
    )
    folder = tmp_path / "records"
    shortstop("export", "1", str(folder), "--format", "every-eval-ever", "--database", with_theirs)
    with closing(open_database(with_theirs)) as db:
        [benchmark] = build_report(db, 1).benchmarks
    files = list(folder.rglob("*.json"))
    assert len(files) == len(benchmark.runs) == 3
    seen = set()
    for file in files:
        record = json.loads(file.read_text(encoding="utf-8"))
        of_run.validate(record)
        assert record["schema_version"] == of_run.schema["version"]
        details = record["detailed_evaluation_results"]
        assert folder / details["file_path"] == file.with_name(f"{file.stem}_samples.jsonl")
        policy = record["model_info"]["additional_details"]["policy"]
        run = next(run for run in benchmark.runs if run.policy == policy)
        found = record["evaluation_results"]
        scores = {one["metric_config"]["metric_name"]: one["score_details"]["score"] for one in found}
        expected = {name: one.value for name, one in run.summary.metrics.items() if name != "first_divergence"}
        assert scores == expected
        instances = lines(folder / details["file_path"])
        assert len(instances) == details["total_rows"] == (COUNT - run.summary.errors) * len(scores)
        for instance in instances:
            of_sample.validate(instance)
            assert instance["evaluation_id"] == record["evaluation_id"]
            seen.add(instance["evaluation_result_id"])
        assert {one["evaluation_result_id"] for one in instances} == {one["evaluation_result_id"] for one in found}
        if policy == "org/their model":
            assert "token_usage" not in instances[0]
            assert {one["evaluation"]["is_correct"] for one in instances} == {False}
    assert len(seen) == 4 + 4 + 3  # theirs agrees with nobody token by token


def test_the_same_job_gives_the_same_bytes(with_theirs: str, tmp_path: Path) -> None:
    for form in ("lm-eval", "every-eval-ever"):
        for name in ("a", "b"):
            shortstop("export", "1", str(tmp_path / form / name), "--format", form, "--database", with_theirs)
        one, other = (contents(tmp_path / form / name) for name in ("a", "b"))
        assert one == other
        assert one


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
