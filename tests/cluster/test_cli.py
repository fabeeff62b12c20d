"""The command line as a user has it: answers on standard output, all else beside it, exit codes that mean something."""

import csv
import io
import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_world import World, bundle, shortstop
from typer.testing import CliRunner, Result

from cluster.cli import app
from db import jobs
from db.session import Database


def call(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def answered(*arguments: object) -> Any:
    """What a command prints as JSON."""
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def done(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished job, made by `shortstop run` in a process of its own."""
    folder = tmp_path_factory.mktemp("done")
    url = f"sqlite:///{folder / 'record.db'}"
    command = ["run", str(world.spec_file(folder / "spec.yaml")), "--inline", "--json"]
    process = shortstop(*command, "--database", url, "--html", str(folder / "report.html"))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return {"url": url, "report": json.loads(out), "stderr": err, "page": folder / "report.html"}


def test_run_answers_on_stdout_and_tells_on_stderr(done: dict[str, Any]) -> None:
    """A pipe behind `run --json` gets JSON and nothing else; progress is plain lines where there is no terminal."""
    assert done["report"]["state"] == "done"
    assert [run["kind"] for run in done["report"]["benchmarks"][0]["runs"]] == ["full", "confidence", "patience", "sec"]
    lines = done["stderr"].splitlines()
    assert lines[0] == "job 1: submitted"
    assert "evaluating: 12 of 12 batches" in lines
    assert "\x1b" not in done["stderr"]


def test_run_writes_the_page_with_tokens_by_exit_layer(done: dict[str, Any]) -> None:
    page = done["page"].read_text(encoding="utf-8")
    assert "<html" in page
    examples = done["report"]["benchmarks"][0]["examples"]
    assert any(completion["tokens"] for example in examples for completion in example["completions"])


def test_query_agrees_with_the_report(done: dict[str, Any]) -> None:
    """The tokens and stops of the view are those that the report counts, layer by layer."""
    sql = "select policy, decision, exit_layer, count(*) as n from token group by 1, 2, 3"
    counted = {(row["policy"], row["decision"], row["exit_layer"]): row["n"] for row in answered_rows(done, sql)}
    for run in done["report"]["benchmarks"][0]["runs"]:
        summary, name = run["summary"], run["policy"]
        by_decision = {
            kind: sum(n for key, n in counted.items() if key[:2] == (name, kind)) for kind in ("full", "exit", "stop")
        }
        assert by_decision == summary["decisions"]
        for layer, tokens in summary["exit_histogram"].items():
            assert sum(counted.get((name, kind, int(layer)), 0) for kind in ("full", "exit")) == tokens
        for layer, stops in summary["stop_histogram"].items():
            assert counted[name, "stop", int(layer)] == stops
    assert sum(counted.values()) > 1000


def answered_rows(done: dict[str, Any], sql: str) -> Any:
    return answered("query", sql, "--database", done["url"])


def test_query_writes_csv_and_json_lines(done: dict[str, Any]) -> None:
    sql = "select policy, count(*) as n from token group by 1 order by 1"
    by_array = answered_rows(done, sql)
    as_lines = call("query", sql, "--database", done["url"], "--format", "jsonl").stdout
    assert [json.loads(line) for line in as_lines.splitlines()] == by_array
    as_csv = list(csv.DictReader(io.StringIO(call("query", sql, "--database", done["url"], "--format", "csv").stdout)))
    assert [(row["policy"], int(row["n"])) for row in as_csv] == [(row["policy"], row["n"]) for row in by_array]
    assert call("query", "-", "--database", done["url"], stdin=sql).stdout.splitlines()[0].split() == ["policy", "n"]


def test_a_piped_table_keeps_a_row_on_a_line(done: dict[str, Any]) -> None:
    out = call("query", "select * from token limit 3", "--database", done["url"]).stdout
    assert len(out.splitlines()) == 4
    assert "…" not in out


def test_list_show_and_report_tell_of_the_job(done: dict[str, Any]) -> None:
    [row] = answered("list", "--database", done["url"])
    assert (row["id"], row["name"], row["state"]) == (1, "small", "done")
    shown = answered("show", 1, "--database", done["url"])
    assert shown["progress"]["batches_done"] == 12
    assert [run["policy_kind"] for run in shown["runs"]] == ["full", "confidence", "patience", "sec"]
    assert answered("report", 1, "--database", done["url"]) == done["report"]
    for command in (("list",), ("show", 1), ("report", 1)):
        out = call(*command, "--database", done["url"])
        assert out.exit_code == 0
        assert "small" in out.stdout


def test_what_show_prints_is_a_spec_that_runs_again(done: dict[str, Any]) -> None:
    out = call("show", 1, "--database", done["url"]).stdout
    spec = out[out.index("name: small") :]
    assert call("validate", "-", stdin=spec).exit_code == 0


def test_validate_says_what_the_job_would_do_and_writes_nothing(world: World, tmp_path: Path) -> None:
    spec = world.spec_file(tmp_path / "spec.yaml")
    found = answered("validate", spec, "-O", "generation.batch_size=5", "-O", "policies.1.threshold=0.25")
    [benchmark] = found["benchmarks"]
    assert (benchmark["samples"], benchmark["batches"], benchmark["shards"]) == (48, 10, 3)
    assert found["policies"][1] == "confidence threshold=0.25"
    assert found["batch_size"] == 5
    assert found["estimate"] is None
    out = call("validate", spec, "-O", "generation.batch_size=auto").stdout
    assert "batch size 4 (auto)" in out
    assert "how long it takes is not known" in out
    assert list(tmp_path.iterdir()) == [spec]


def test_validate_says_how_long_it_would_take(done: dict[str, Any], world: World, tmp_path: Path) -> None:
    spec = world.spec_file(tmp_path / "spec.yaml")
    found = answered("validate", spec, "--database", done["url"])["estimate"]
    assert found["jobs"] == 1
    took = answered("query", "select sum(decode_ns) / 1e9 as s from batch", "--database", done["url"])[0]["s"]
    assert found["seconds"] > took
    assert re.search(
        r"about \S+ s of work, going by 1 earlier job;", call("validate", spec, "--database", done["url"]).stdout
    )


def test_relative_paths_start_from_the_specs_folder(world: World, tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text('{"prompt": "a = ", "reference": "1"}\n')
    spec = world.spec_file(tmp_path / "spec.yaml", benchmarks=[{"jsonl": "lines.jsonl"}])
    assert answered("validate", spec)["benchmarks"][0]["samples"] == 1


def test_names_are_listed_with_what_they_are() -> None:
    for command, name in (("models", "smollm2-135m"), ("benchmarks", "humaneval-lines"), ("policies", "sec")):
        assert name in {row["name"] for row in answered(command)}
        assert name in call(command).stdout
    sec = next(row for row in answered("policies") if row["name"] == "sec")
    assert {option["name"] for option in sec["options"] if option["required"]} == {"exit", "stop"}


# --- bad input ----------------------------------------------------------------------------------------------------

OVERRIDES = [
    ("model=smolm2-135m", "did you mean 'smollm2-135m'?"),
    ("policies.1={confidenc: {threshold: 0.5}}", "did you mean 'confidence'?"),
    ("benchmarks.0=humaneval-line", "did you mean 'humaneval-lines'?"),
    ("metrics=[roug_l]", "did you mean 'rouge_l'?"),
    ("policies.1.threshold=1.5", "threshold"),
    ("policies.1={fixed: {exit_layer: 99}}", "99"),
    ("policies.1={fixed: {exit_layer: 3}}", "3"),
    ("generation.max_new_tokens=5000", "5000"),
    ("generation.batch_size=0", "generation.batch_size is 0; give a whole number of at least 1, or auto."),
    ("generation.batch_size=atuo", "generation.batch_size is 'atuo'; give a whole number of at least 1, or auto."),
    ("compile=maybe", "field 'compile' is 'maybe'; input should be 'auto', 'on' or 'off'."),
    ("policies.1.threshold=true", "threshold"),
    ("priority=99999999999999999999", "priority"),
    ("metrics=[]", "metrics"),
    ("benchmarks=[humaneval-lines, humaneval-lines]", "the same name or content"),
    ("polices=[full]", "polices"),
    ("policies=[full, full]", "'full' is there twice"),
    ("exits=null", "needs exits"),
    ("exits=nowhere", "nowhere"),
    ("device=tpu", "tpu"),
    ("benchmarks.0.jsonl=none.jsonl", "none.jsonl"),
    ("benchmarks.0.prompt=text", "text"),
    ("benchmarks.0.wrong=1", "wrong"),
    ("policies.9.threshold=1", "policies.9.threshold"),
    ("name", "dotted.path=value"),
]


@pytest.mark.parametrize(("override", "told"), OVERRIDES, ids=[override for override, _ in OVERRIDES])
def test_a_bad_spec_is_one_sentence_and_changes_nothing(world: World, tmp_path: Path, override: str, told: str) -> None:
    """Exit code 2, one line that names the fault, no database."""
    spec = world.spec_file(tmp_path / "spec.yaml")
    result = call("run", spec, "--inline", "--database", f"sqlite:///{tmp_path / 'record.db'}", "-O", override)
    assert_refused(result, told)
    assert list(tmp_path.iterdir()) == [spec]


FILES = [
    ("model: [", "line 1"),
    ("- a list", "mapping"),
    ("", "mapping"),
    ("model: x", "'policies' is missing"),
    ("model: x\nbenchmarks: []\npolicies: [full]", "benchmarks"),
]


@pytest.mark.parametrize(("text", "told"), FILES)
def test_a_file_that_is_no_spec_is_refused(text: str, told: str) -> None:
    assert_refused(call("run", "-", stdin=text), told)


def test_a_broken_line_of_jsonl_is_named_with_file_and_number(world: World, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "a", "reference": "b"}\n{"prompt": \n')
    spec = world.spec_file(tmp_path / "spec.yaml", benchmarks=[{"jsonl": "lines.jsonl"}])
    result = call("run", spec, "--database", f"sqlite:///{tmp_path / 'record.db'}")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"lines\.jsonl\S*,? line 2\b", " ".join(result.stdout.split())), result.stdout


def test_exits_of_other_weights_are_refused(world: World, tmp_path: Path) -> None:
    from tiny_models import random_model, save

    other = save(random_model("llama", seed=1), tmp_path / "other")
    exits = bundle(tmp_path / "exits", other)
    spec = world.spec_file(tmp_path / "spec.yaml", exits=str(exits))
    assert_refused(call("run", spec, "--database", f"sqlite:///{tmp_path / 'record.db'}"), "weights")


@pytest.mark.parametrize("fault", ["family", "tokenizer"])
def test_a_model_that_no_worker_could_run_is_refused_before_there_is_a_job(
    world: World, tmp_path: Path, fault: str
) -> None:
    from tiny_models import random_model, save

    model = save(random_model("llama", seed=1), tmp_path / "model")
    if fault == "family":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    else:
        for file in model.glob("tokenizer*"):
            file.unlink()
    spec = world.spec_file(tmp_path / "spec.yaml", model=str(model), exits=None, policies=["full"])
    assert_refused(call("run", spec, "--inline", "--database", f"sqlite:///{tmp_path / 'record.db'}"), fault)
    assert not (tmp_path / "record.db").exists()


def test_reading_makes_no_database(tmp_path: Path) -> None:
    assert_refused(call("list", "--database", f"sqlite:///{tmp_path / 'new' / 'record.db'}"), "does not exist")
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_refused_before_any_work(world: World, tmp_path: Path) -> None:
    spec = world.spec_file(tmp_path / "spec.yaml")
    url = f"sqlite:///{tmp_path / 'record.db'}"
    assert_refused(
        call("run", spec, "--database", url, "--html", tmp_path / "none" / "report.html"), "there is no folder"
    )
    assert_refused(call("run", spec, "--database", url, "--html", tmp_path), "folder")
    assert not (tmp_path / "record.db").exists()
    assert_refused(call("list", "--database", f"sqlite:///{spec}/record.db"), "spec.yaml")
    assert_refused(call("list", "--database", "mysql://x/y"), "mysql")


def test_a_database_of_a_newer_version_is_refused_and_stays_as_it_is(done: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "record.db"
    file.write_bytes(Path(done["url"].removeprefix("sqlite:///")).read_bytes())
    with sqlite3.connect(file) as connection:
        connection.execute("update alembic_version set version_num = '9999'")
    for command in (("list",), ("report", 1), ("resume", 1), ("db", "upgrade"), ("query", "select 1")):
        assert_refused(call(*command, "--database", f"sqlite:///{file}"), "newer")
    with sqlite3.connect(file) as connection:
        assert connection.execute("select version_num from alembic_version").fetchall() == [("9999",)]


def test_commands_about_a_job_name_the_one_that_is_not_there(done: dict[str, Any]) -> None:
    for command in ("show", "report", "resume"):
        assert_refused(call(command, 77, "--database", done["url"]), "job 77")


def test_query_only_reads(done: dict[str, Any]) -> None:
    for sql in ("delete from task", "select * from task", "drop view token", "selec 1", "select 1; select 2"):
        assert_refused(call("query", sql, "--database", done["url"]), "")


def test_training_refuses_a_bad_spec(tmp_path: Path) -> None:
    spec = {"model": "smollm2-135m", "corpus": ["json"], "holdout": ["json"], "exit_points": [3]}
    for change, told in (({}, "json"), ({"holdout": ["csv"], "epochs": 0}, "epochs"), ({"corpus": []}, "corpus")):
        text = yaml.safe_dump(spec | change)
        assert_refused(call("train", "-", "--out", tmp_path / "bundle", stdin=text), told)
    assert list(tmp_path.iterdir()) == []


def test_usage_errors_are_bad_input_too() -> None:
    assert [call(*line).exit_code for line in (("nocommand",), ("list", "--nooption"), ("show", "one"), ("run",))] == [
        2
    ] * 4


def assert_refused(result: Result, told: str) -> None:
    """Exit code 2 and one sentence on standard error, without a traceback."""
    assert result.exit_code == 2, (result.exception, result.stderr)
    [line] = result.stderr.splitlines()
    assert line.startswith("shortstop: ")
    assert told in line
    assert result.stdout == ""


# --- ends ---------------------------------------------------------------------------------------------------------


def test_a_job_that_failed_ends_with_1_and_its_reason(world: World, db: Database) -> None:
    job_id = jobs.create_job(db, name="small", spec=json.loads(json.dumps(world.fields())))
    jobs.fail_job(db, job_id, "the disk was full.")
    result = call("resume", job_id, "--inline", "--database", db.url)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"shortstop: job {job_id} failed: the disk was full."


def test_doctor_finds_what_is_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SHORTSTOP_CACHE")  # the converted model lies in the user's cache
    checks = {check["name"]: check for check in answered("doctor", "--database", f"sqlite:///{tmp_path / 'record.db'}")}
    assert checks["torch"]["finding"] == "ok"
    assert "not run on a GPU yet: the engine" in checks["gpu"]["detail"]
    assert "`pytest -m gpu`" in checks["gpu"]["detail"]
    assert re.fullmatch(r"\d+\.\d GiB, \d+\.\d GiB free", checks["memory"]["detail"])
    assert checks["model smollm2-135m"]["finding"] == "ok"
    assert checks["benchmark humaneval-lines"]["finding"] == "ok"
    absent = {name: check for name, check in checks.items() if name.startswith("benchmark codex")}
    assert len(absent) == 2
    assert all(check["finding"] == "note" and "fetch dataset.zip" in check["detail"] for check in absent.values())
    assert checks["benchmark codesearchnet-python-lines"]["finding"] == "note"
    assert checks["database"]["finding"] == "note"
    assert list(tmp_path.iterdir()) == []


def test_doctor_ends_with_1_where_something_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SHORTSTOP_CACHE")
    file = tmp_path / "record.db"
    file.write_text("this is no database")
    result = call("doctor", "--database", f"sqlite:///{file}", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)[-1]
    assert (found["name"], found["finding"]) == ("database", "missing")
    assert str(file) in found["detail"]


def test_db_upgrade_makes_a_record_and_then_has_nothing_to_do(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'record.db'}"
    first, second = answered("db", "upgrade", "--database", url), answered("db", "upgrade", "--database", url)
    assert first["before"] is None
    assert second["before"] == second["after"] == first["after"]
