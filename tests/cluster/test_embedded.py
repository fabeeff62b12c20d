"""The public Python API runs the whole system in the caller's process."""

from pathlib import Path

import pytest
from small_world import POLICIES, World

import shortstop


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('embedded') / 'record.db'}"


@pytest.fixture(scope="module")
def evaluated(world: World, url: str) -> shortstop.JobReport:
    return shortstop.evaluate(world.fields(), database=url, inline=True)


def test_evaluate_returns_a_report_with_a_row_a_run(evaluated: shortstop.JobReport) -> None:
    assert evaluated.state == "done"
    table = evaluated.table()
    assert len(table) == len(POLICIES)
    assert {"policy", "mean_exit_layer", "speedup_token", "es", "change_es"} <= set(table.columns)


def test_completions_and_tokens_are_those_of_the_report(evaluated: shortstop.JobReport, url: str) -> None:
    completions = shortstop.completions(evaluated, database=url)
    tokens = shortstop.tokens(evaluated.job_id, database=url).read_pandas()
    assert len(completions) == 48 * len(POLICIES)
    assert completions.groupby("policy")["n_tokens"].sum().to_dict() == {
        run.policy: run.summary.tokens for run in evaluated.runs
    }
    assert tokens["token_id"].isna().sum() == sum(run.summary.stops for run in evaluated.runs)
    assert (tokens["token_id"].isna() == (tokens["decision"] == "stop")).all()
    assert len(tokens) == sum(run.summary.tokens + run.summary.stops for run in evaluated.runs)


def test_completions_are_streamed_as_arrow(
    evaluated: shortstop.JobReport, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows and columns as the DataFrame, in pieces."""
    monkeypatch.setattr("cluster.frames._PIECE", 50)
    table = shortstop.completions(evaluated, database=url)
    reader = shortstop.completions(evaluated.job_id, arrow=True, database=url)
    batches = list(reader)
    assert [len(batch) for batch in batches] == [50, 50, 50, 42]
    rows = [row for batch in batches for row in batch.to_pylist()]
    assert reader.schema.names[:3] == ["run_id", "policy", "benchmark"]
    assert set(reader.schema.names) == set(table.columns)
    assert rows == table[reader.schema.names].astype(object).where(table[reader.schema.names].notna(), None).to_dict(
        "records"
    )


def test_the_report_can_be_read_again(evaluated: shortstop.JobReport, url: str) -> None:
    assert shortstop.report(evaluated.job_id, database=url) == evaluated


@pytest.mark.parametrize("form", ["file", "text", "JobSpec"])
def test_a_spec_is_taken_in_every_form_and_refused_before_anything_is_written(
    world: World, tmp_path: Path, form: str
) -> None:
    file = world.spec_file(tmp_path / "spec.yaml", model="nowhere")
    spec = {"file": file, "text": str(file), "JobSpec": world.spec(model="nowhere")}[form]
    with pytest.raises(shortstop.BadInput, match="nowhere"):
        shortstop.evaluate(spec, database=f"sqlite:///{tmp_path / 'record.db'}", inline=True)
    assert not (tmp_path / "record.db").exists()


def test_a_job_that_is_not_there_is_an_error_at_once(evaluated: shortstop.JobReport, url: str) -> None:
    for read in (shortstop.report, shortstop.completions, shortstop.tokens):
        with pytest.raises(shortstop.RecordError, match="job 77"):
            read(77, database=url)
