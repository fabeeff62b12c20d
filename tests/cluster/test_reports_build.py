"""Reports built from a real record, through its doors."""

import io
from collections.abc import Iterator
from dataclasses import replace

import pytest
from made import claimed, planned_job, results_of
from rich.console import Console

from cluster.reports.build import build_report, live_summary
from cluster.reports.examples import first_divergence
from cluster.reports.model import JobReport, RunSummary
from cluster.reports.page import render_page
from cluster.reports.terminal import print_report
from db import devices, jobs, results
from db.errors import BadInput
from db.records import Rollup
from db.rollups import rollup
from db.session import Database, open_database
from workers.estimates import summarise

POLICIES = ("full", "confidence threshold=0.9", "sec exit=0.9", "self-speculative exit_layer=18")


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    database = open_database(f"sqlite:///{tmp_path_factory.mktemp('record') / 'record.db'}")
    yield database
    database.close()


@pytest.fixture(scope="module")
def finished(db: Database) -> int:
    """A job of two benchmarks that is done."""
    job_id = planned_job(db, 40, policies=POLICIES, benchmarks=("lines", "bodies"))
    commit(db, job_id, 20)
    assert results.finalise(db, job_id, summarise)
    return job_id


def commit(db: Database, job_id: int, shards: int) -> None:
    for _ in range(shards):
        lease = claimed(db, job_id=job_id)
        results.commit_shard(db, lease, results_of(db, lease))


def spelled(ids: list[int]) -> list[str]:
    return [f"<{token}>" for token in ids]


def printed(report: JobReport) -> str:
    file = io.StringIO()
    print_report(report, Console(file=file))
    return file.getvalue()


def test_a_finished_job_is_reported_as_its_summaries_say(db: Database, finished: int) -> None:
    report = build_report(db, finished)
    assert (report.state, report.partial, report.batches_done) == ("done", False, 40)
    stored = jobs.runs(db, finished)
    assert [run.run_id for run in report.runs] == [run.id for run in stored]
    assert [run.summary for run in report.runs] == [RunSummary.model_validate(run.summary) for run in stored]
    assert report.provenance == jobs.job(db, finished).pinned
    assert [(b.name, b.samples, b.left_out) for b in report.benchmarks] == [
        ("lines", 40, ["file x was empty."]),
        ("bodies", 40, ["file x was empty."]),
    ]


def test_it_knows_every_field_of_a_summary(db: Database, finished: int) -> None:
    """What estimates add to the summary must not be lost on the way into reports."""
    summary = jobs.runs(db, finished)[1].summary
    assert summary is not None
    assert set(summary) == set(RunSummary.model_fields)


def test_a_real_job_renders(db: Database, finished: int) -> None:
    report = build_report(db, finished, spelled)
    stops = [f"{run.summary.stops:,}" for run in report.runs]
    written, page = printed(report), render_page(report)
    for number in [*stops, f"{report.runs[1].summary.tokens:,}", f"{report.runs[1].summary.mean_exit_layer:.1f} / 30"]:
        assert number in written
        assert number in page.replace('<span class="of">', "")


def test_a_job_under_way_is_reported_as_partial(db: Database) -> None:
    job_id = planned_job(db, 24, policies=POLICIES, benchmarks=("few",))
    empty = build_report(db, job_id)
    assert (empty.partial, empty.benchmarks[0].examples, empty.runs[1].summary.samples) == (True, [], 0)
    commit(db, job_id, 3)
    report = build_report(db, job_id)
    assert (report.partial, report.batches_done, report.batches_total) == (True, 6, 12)
    assert [run.summary.samples for run in report.runs] == [12] * 4
    assert all(run.summary.speedup_token.low is None for run in report.runs)
    assert "This report is partial: the job is running, 6 of 12 batches are done." in " ".join(printed(report).split())
    assert "partial" in render_page(report)


def test_a_job_being_prepared_has_a_report(db: Database) -> None:
    report = build_report(db, jobs.create_job(db, name="new", spec={"model": "smollm2-135m", "exits": "mine"}))
    assert (report.state, report.partial, report.benchmarks) == ("preparing", True, [])
    assert (report.model, report.exits) == ("smollm2-135m", "mine")


def test_live_sums_end_where_the_summary_stands(db: Database, finished: int) -> None:
    """What a live report shows of a job's last moment is what the finished one shows, but for what needs every row."""
    runs = jobs.runs(db, finished)[: len(POLICIES)]
    full = rollup(db, runs[0].id)
    for run in runs:
        live, stored = live_summary(rollup(db, run.id), full, 30), RunSummary.model_validate(run.summary)
        for name in (
            "samples",
            "errors",
            "tokens",
            "stops",
            "cut_prompts",
            "isolated",
            "flops",
            "untimed_batches",
            "decisions",
        ):
            assert getattr(live, name) == getattr(stored, name), name
        assert (live.drafted, live.drafts_kept) == (stored.drafted, stored.drafts_kept)
        assert live.drafts_kept_share == stored.drafts_kept_share
        for name in ("mean_exit_layer", "mean_layers_run", "layers_skipped", "tokens_per_second", "shown"):
            assert getattr(live, name) == pytest.approx(getattr(stored, name)), name
        assert live.exit_histogram == stored.exit_histogram
        assert live.stop_histogram == stored.stop_histogram
        assert {name: e.value for name, e in live.metrics.items()} == pytest.approx(
            {name: e.value for name, e in stored.metrics.items()}
        )


def test_drafts_are_shown_where_there_are_any(db: Database, finished: int) -> None:
    """Counts and the share kept in JSON, on the terminal and on the page: 20 batches of 7, 3 or 4 of them kept."""
    report = build_report(db, finished)
    found = [(run.summary.drafted, run.summary.drafts_kept, run.summary.drafts_kept_share) for run in report.runs[:4]]
    assert found == [(0, 0, None)] * 3 + [(140, 70, 0.5)]
    lines = printed(report).splitlines()
    table = next(place for place, line in enumerate(lines) if line.split()[:1] == ["Drafts"])
    assert lines[table + 2].split() == ["self-speculative", "exit_layer=18", "140", "70", "50.0%"]
    assert not lines[table + 3].strip(), "nothing of the policies that draft nothing"
    assert render_page(report).count('aria-label="Drafts on ') == 2


def test_examples_say_which_tokens_were_drafts(db: Database, finished: int) -> None:
    """By the arrays of the outcome: the layer that drafted, and whether full depth agreed."""
    report = build_report(db, finished, spelled)
    rows = {(row.run_id, row.sample.name): row for row in results.completions(db, job_id=finished)}
    said = 0
    for benchmark in report.benchmarks:
        for example in benchmark.examples:
            for run, completion in zip(benchmark.runs, example.completions, strict=True):
                outcome = rows[run.run_id, example.sample].outcome
                drafts = outcome.tokens.drafts.tolist() if outcome.tokens is not None else []
                found = [(t.draft_layer, t.draft_kept) for t in completion.tokens]
                assert found == [(abs(draft), draft > 0) if draft else (None, None) for draft in drafts]
                said += sum(map(bool, drafts))
    page = render_page(report)
    assert page.count("· drafted after layer ") == said > 0
    assert "drafted after layer 24, full depth agreed" in page
    assert "drafted after layer 18, full depth chose this instead" in page


def test_a_report_says_with_which_kernels_it_was_computed(db: Database) -> None:
    """By device class and shape, in the provenance of JSON and page: what the job noted, not what is planned today."""
    job_id = planned_job(db, 2, policies=POLICIES[:1], benchmarks=("kernels",))
    shapes, plan = ["576x1536"], {"576x1536": ["packed", "linear"]}
    devices.keep_kernels(db, job_id, "cpu-test", devices.kernel_plan(db, "cpu-test", shapes, lambda _: plan))
    commit(db, job_id, 1)
    devices.kernel_plan(db, "cpu-test", ["1x1"], lambda _: {"1x1": ["columns"]})
    report = build_report(db, job_id)
    assert report.provenance == (jobs.job(db, job_id).pinned or {}) | {"kernels": {"cpu-test": plan}}
    page = " ".join(render_page(report).split())
    assert "<h3>Kernels on cpu-test</h3>" in page
    assert "<dt>576x1536</dt><dd>packed, linear</dd>" in page


def test_a_live_speedup_is_a_ratio_of_sums_over_the_same_batches() -> None:
    full = Rollup(timed_batches=2, prefill_ns=50, decode_ns=600, decode_tokens=60, ideal_ns=300)
    run = Rollup(timed_batches=2, prefill_ns=50, decode_ns=240, decode_tokens=30, ideal_ns=120)
    live = live_summary(run, full, 30)
    assert (live.speedup_token.value, live.speedup_ideal, live.efficiency) == pytest.approx((1.25, 1.25, 1.0))
    assert live.speedup_request.value == pytest.approx(650 / 290)
    unpaired = live_summary(replace(run, timed_batches=1), full, 30)
    assert (unpaired.speedup_token.value, unpaired.speedup_request.value) == (None, None)


def test_samples_done_in_pieces_are_counted_while_the_job_runs() -> None:
    """Protects the reader of a live report as much as that of a finished one."""
    assert live_summary(Rollup(samples=4, isolated=3), None, 30).isolated == 3


def test_examples_are_the_telling_samples(db: Database, finished: int) -> None:
    report = build_report(db, finished, spelled)
    rows = {(row.run_id, row.sample.name): row for row in results.completions(db, job_id=finished)}
    for benchmark in report.benchmarks:
        assert len(benchmark.examples) == 4
        assert "A policy stopped." in {example.why for example in benchmark.examples}
        for example in benchmark.examples:
            for run, completion in zip(benchmark.runs, example.completions, strict=True):
                outcome = rows[run.run_id, example.sample].outcome
                assert (completion.policy, completion.text, completion.error) == (
                    run.policy,
                    outcome.text,
                    outcome.error,
                )
                if outcome.tokens is not None:
                    ids = outcome.tokens.token_ids.tolist()
                    assert [t.text for t in completion.tokens] == [f"<{i}>" if i >= 0 else "" for i in ids]
                    assert [t.exit_layer for t in completion.tokens] == outcome.tokens.exit_layers.tolist()
                    assert (completion.tokens[-1].decision == "stop") is (outcome.finish == "stop")


def test_without_a_tokenizer_examples_are_plain_text(db: Database, finished: int) -> None:
    completions = [c for b in build_report(db, finished).benchmarks for e in b.examples for c in e.completions]
    assert any(c.text for c in completions)
    assert not any(c.tokens for c in completions)


def test_a_built_report_survives_json(db: Database, finished: int) -> None:
    report = build_report(db, finished, spelled)
    assert JobReport.model_validate_json(report.model_dump_json()) == report


def test_an_unknown_job_is_bad_input(db: Database) -> None:
    with pytest.raises(BadInput, match="job 999 does not exist"):
        build_report(db, 999)


@pytest.mark.parametrize(
    ("ids", "baseline", "index"),
    [([1, 2], [1, 2], None), ([1], [1, 2], None), ([], [1], None), ([1, 3], [1, 2], 1), ([1, 2, 3], [1, 2], 2)],
)
def test_a_prefix_of_full_depth_does_not_diverge(ids: list[int], baseline: list[int], index: int | None) -> None:
    assert first_divergence(ids, baseline) == index
