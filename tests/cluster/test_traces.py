"""A trace from its spec to a replay, and to finalists that run live."""

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_world import World, bundle, rows
from typer.testing import CliRunner

import shortstop
from cluster import adding, jobs, rescoring
from cluster.cli import app
from cluster.confirming import confirm_live, run_live
from cluster.grids import MOST_POLICIES, ReplaySpec, default_policies, expand, parse_replay, read_replay
from cluster.replays import ReplayReport, replay_trace
from cluster.settings import Settings
from cluster.spec import parse_job
from cluster.traced import Trace, trace_of, traces_of
from db.records import JobState
from db.session import Database, open_database
from db.traces import MOST_BYTES, pack, unpack
from engine.errors import BadInput
from engine.replay.decide import Oracle
from engine.spec import policy


def traced_spec(world: World, target: str, **changes: Any) -> dict[str, Any]:
    fields = world.fields(trace=target, **changes)
    return {name: value for name, value in fields.items() if name != "policies"}


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    with closing(open_database(f"sqlite:///{tmp_path_factory.mktemp('traces') / 'record.db'}")) as opened:
        yield opened


@pytest.fixture(scope="module")
def of_reference(world: World, db: Database) -> Trace:
    return done(db, traced_spec(world, "reference"))


@pytest.fixture(scope="module")
def of_full(world: World, db: Database) -> Trace:
    return done(db, traced_spec(world, "full"))


def done(db: Database, spec: dict[str, Any]) -> Trace:
    job_id = jobs.submit(db, parse_job(spec))
    assert jobs.work(db, job_id, inline=True) is JobState.DONE
    return trace_of(db, job_id)


def replayed(db: Database, trace: Trace, *policies: Any) -> ReplayReport:
    return replay_trace(trace, ReplaySpec(policies=list(policies)))


def test_a_trace_holds_the_references_tokens(of_reference: Trace, world: World) -> None:
    """Protects what is traced: each sample's reference as the model's tokenizer reads it, as far as a policy goes."""
    import tiny_models

    tokenizer = tiny_models.tiny_tokenizer()
    seen = [one for piece in of_reference.samples(10) for one in piece]
    references = [json.loads(line)["reference"] for line in world.prompts.read_text().splitlines()]
    assert [one.name for one in seen] == [f"s{i}" for i in range(48)]
    assert [one.source_group for one in seen[:6]] == ["f0"] * 5 + ["f1"]
    for one, reference in zip(seen, references, strict=True):
        assert tokenizer.decode(one.arrays.targets) == reference[:8]
        assert one.arrays.tokens.shape == (len(of_reference.points), 8)
    assert of_reference.points[-1] == of_reference.pinned.n_layers


def test_a_trace_of_full_depth_finds_full_depth_right(db: Database, of_full: Trace) -> None:
    """Protects `target: full`: what full depth wrote is, teacher-forced, what full depth would write."""
    found = replayed(db, of_full, "full", "oracle")
    assert found.policies[0].figures["tokens_right"].value == 1
    assert found.policies[0].figures["speedup_ideal"].value == pytest.approx(1)
    assert found.policies[1].figures["tokens_right"].value == 1
    assert found.policies[1].figures["mean_exit_layer"].value < of_full.pinned.n_layers


def test_shards_and_batches_do_not_change_a_trace(db: Database, world: World, of_reference: Trace) -> None:
    """Protects resume and sharding: each sample has one row, the same but for float noise in another batch size."""
    other = done(
        db, traced_spec(world, "reference", shard_batches=1, generation={"max_new_tokens": 8, "batch_size": 3})
    )
    pairs = zip(
        (one for piece in of_reference.samples() for one in piece),
        (one for piece in other.samples() for one in piece),
        strict=True,
    )
    for one, two in pairs:
        assert (one.name, one.prompt_key, one.prompt_tokens) == (two.name, two.prompt_key, two.prompt_tokens)
        for column in one.arrays.__dataclass_fields__:
            assert np.allclose(getattr(one.arrays, column), getattr(two.arrays, column), atol=1e-4), column
    counted = "SELECT count(*), count(DISTINCT sample_id) FROM trace WHERE run_id = "
    assert rows(db, f"{counted}{other.run.id}") == [(48, 48)]


def test_the_layout_keeps_every_bit_in_36_bytes(of_reference: Trace) -> None:
    """Protects the table: arrays come back as they went in, and take no more than is promised before compression."""
    from db import traces

    for one in next(of_reference.samples()):
        points, n = one.arrays.tokens.shape
        assert traces._size(points, n) <= MOST_BYTES * points * n
        back = unpack(traces.LAYOUT, points, n, pack(one.arrays))
        for column in one.arrays.__dataclass_fields__:
            assert np.array_equal(getattr(back, column), getattr(one.arrays, column)), column
    with pytest.raises(ValueError, match="layout 2, this version reads 1"):
        unpack(2, points, n, b"")


def test_arrow(db: Database, of_reference: Trace) -> None:
    """Protects the public API: a row a token and exit point, with the numbers of the trace."""
    table = shortstop.traces(of_reference.run.job_id, database=db.url).read_pandas()
    points = len(of_reference.points)
    first = next(of_reference.samples())[0]
    own = table[table["sample"] == "s0"]
    assert len(table) == 48 * 8 * points
    assert own["exit_layer"].tolist() == list(of_reference.points) * 8
    assert own["position"].tolist() == [place for place in range(1, 9) for _ in range(points)]
    for column, name in [("tokens", "token_id"), ("probabilities", "probability"), ("margins", "margin")]:
        assert own[name].tolist() == pytest.approx(getattr(first.arrays, column).T.ravel().tolist())
    assert own["p_stop"].tolist() == pytest.approx(first.arrays.controller[:, 2].T.ravel().tolist())
    assert own["rank"].tolist() == (first.arrays.ranks + 1).T.ravel().tolist()
    assert set(own["target_id"]) == set(first.arrays.targets.tolist())


def test_confirmed_live(db: Database, of_full: Trace) -> None:
    """Protects honesty: under `recompute` no token behind the same text is decided otherwise."""
    found = replayed(db, of_full, {"confidence": {"threshold": [0.2, 0.4, 0.6]}}, "full", "oracle")
    confirmed = confirm_live(db, of_full, found, 1, Settings(), inline=True)
    assert [one.kv for one in confirmed] == ["copy", "recompute", "mask"]
    for one in confirmed:
        assert one.compared > 48
        assert set(one.figures) == {"tokens_right", "agreement", "mean_exit_layer", "speedup_ideal", "stop_share"}
        assert one.figures["mean_exit_layer"].measured is not None
        assert one.figures["speedup_ideal"].drift == pytest.approx(
            one.figures["speedup_ideal"].measured - one.figures["speedup_ideal"].replayed
        )
    by_kv = {one.kv: one for one in confirmed}
    assert by_kv["recompute"].decided_otherwise == 0
    assert by_kv["copy"].decided_otherwise > 0  # random weights: what is copied is far from what would be computed


def test_confirming_counts_what_differs(db: Database, of_full: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the count of drift: a replay by another threshold than the live run's differs where its tokens do."""
    import cluster.confirming

    found = replayed(db, of_full, {"confidence": {"threshold": 0.3}})
    real = cluster.confirming.decide
    monkeypatch.setattr(
        cluster.confirming, "decide", lambda asked, piece: real(asked.model_copy(update={"threshold": 1.0}), piece)
    )
    one = confirm_live(db, of_full, found, 1, Settings(), inline=True)[1]
    assert one.kv == "recompute"
    assert 0 < one.decided_otherwise <= one.compared


def test_what_has_changed_since_the_trace_is_not_confirmed(db: Database, world: World, tmp_path: Path) -> None:
    """Protects drift from being something else: a live run of other exits or samples is no measure of a replay."""
    exits, prompts = tmp_path / "exits", tmp_path / "prompts.jsonl"
    bundle(exits, world.model)
    before = "".join(world.prompts.read_text().splitlines(keepends=True)[:4])
    prompts.write_text(before)
    asked = {"jsonl": str(prompts), "id": "id", "ends": "text"}
    trace = done(db, traced_spec(world, "full", exits=str(exits), benchmarks=[asked]))

    def confirm() -> None:
        run_live(db, trace, "changed", [policy("fixed", exit_layer=4)], ["es"], Settings(), inline=True)

    confirm()
    prompts.write_text(before.replace("ret", "rat"))
    with pytest.raises(BadInput, match=r"has changed since job .* was traced; trace it again"):
        confirm()
    prompts.write_text(before)
    shutil.rmtree(exits)
    bundle(exits, world.model, seed=1)
    with pytest.raises(BadInput, match=r"exits_hash has changed since job .* was traced; trace it again"):
        confirm()


def test_a_trace_keeps_what_a_record_promises(db: Database, of_reference: Trace, of_full: Trace) -> None:
    """Protects `db check`: outcomes, timings and rollups of traces are whole."""
    from cluster.contents import hashes
    from db.checks import check

    assert of_reference.target != of_full.target
    assert list(check(db, hashes())) == []


def test_command_line(db: Database, world: World, tmp_path: Path) -> None:
    """Protects the commands: trace, replay as table, JSON, CSV and page."""
    spec = world.spec_file(tmp_path / "spec.yaml")  # its policies are left aside
    runner = CliRunner()
    done = runner.invoke(app, ["trace", str(spec), "--inline", "--database", db.url, "--json"])
    assert done.exit_code == 0, done.output
    job = json.loads(done.stdout)["id"]
    table = runner.invoke(app, ["replay", str(job), "--database", db.url])
    assert table.exit_code == 0, table.output
    assert "Pareto front" in table.stdout
    asked = ["replay", str(job), "-p", "{confidence: {threshold: [0.3, 0.6]}}", "-p", "oracle", "--database", db.url]
    files = [tmp_path / "replay.csv", tmp_path / "replay.html"]
    told = runner.invoke(app, [*asked, "--json", "--csv", str(files[0]), "--html", str(files[1])])
    assert told.exit_code == 0, told.output
    policies = json.loads(told.stdout)["replays"][0]["policies"]
    assert [one["policy"] for one in policies] == ["confidence threshold=0.3", "confidence threshold=0.6", "oracle"]
    assert len(files[0].read_text().splitlines()) == 4
    assert files[1].read_text().startswith("<!doctype html>")
    assert runner.invoke(app, ["report", str(job), "--database", db.url]).exit_code == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{confidence: {threshold: 0.5, threshhold: [0.5]}}", "'threshhold' is not known"),
        ("{confidence: {threshold: [0.5, 2]}}", "'threshold' is 2"),
        ("{confidense: {threshold: [0.5]}}", "did you mean 'confidence'"),
        ("{oracle: {threshold: 0.5}}", "'threshold' is not known"),
        ("{confidence: {threshold: []}}", "empty list"),
        ("{confidence: {threshold: {from: 0, to: 1, steps: 1}}}", "from 2"),
        ("{confidence: {threshold: {from: 0, to: .inf, steps: 3}}}", "give numbers for from and to, and"),
        ("{static: {layers: [2]}}", "'static' cannot be replayed"),
        ("{self-speculative: {exit_layer: 4}}", "rolled back"),
        ("{fixed: {exit_layer: [3, 4]}}", "exit_layer is 3, which is no exit point"),
        ("{policies: [full], exits: others}", "exits: the policies are for 'others'"),
        ("{policies: [full], weights_hash: abc}", "weights_hash: the policies are for 'abc'"),
        ("{policies: [full], exits_hash: abc}", "exits_hash: the policies are for 'abc'"),
        ("{policies: [full], content_hash: abc}", "content_hash: the policies are for 'abc'"),
        ("{policies: [full], model: smollm2-135m}", "model: the policies are for 'smollm2-135m'"),
        ("{policies: [full], benchmark: humaneval-lines}", "benchmark: the policies are for 'humaneval-lines'"),
        ("{policies: [full], colour: red}", "'colour' is not known"),
        ("{confidence: {threshold: {from: 0, to: 1, steps: 300}, min_layer: [1, 2], full_first: [1, 2, 3, 4],"
         " max_debt: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]}}", r"24,000 cells, which would take about \d+ seconds"),
        ("nowhere.yaml", "cannot be read"),
        ("{confidence: [", "is not YAML"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(db: Database, of_reference: Trace, text: str, sentence: str) -> None:
    """Protects users: field, value and remedy; nothing is replayed."""
    with pytest.raises(BadInput, match=sentence):
        replay_trace(of_reference, read_replay(text))


def test_what_a_trace_lacks(db: Database, world: World, tmp_path: Path) -> None:
    """Protects users of exits without a controller, of jobs that are no traces, and of traces that are not done."""
    exits = bundle(tmp_path / "exits", world.model, controller=False)
    trace = done(db, traced_spec(world, "reference", exits=str(exits)))
    with pytest.raises(BadInput, match="needs the column controller"):
        replayed(db, trace, {"sec": {"exit": 0.5, "stop": 0.5}})
    assert all("controller" not in entry for entry in default_policies(trace.pinned))
    replayed(db, trace, *default_policies(trace.pinned))

    waiting = jobs.submit(db, parse_job(traced_spec(world, "reference")))
    with pytest.raises(ValueError, match="is preparing, and a trace can be asked when it is done"):
        traces_of(db, waiting)
    ordinary = jobs.submit(db, world.spec(policies=["full"]))
    assert jobs.work(db, ordinary, inline=True) is JobState.DONE
    with pytest.raises(ValueError, match="is no trace"):
        traces_of(db, ordinary)
    with pytest.raises(ValueError, match="has no trace of benchmark 'other'"):
        trace_of(db, trace.run.job_id, "other")
    with pytest.raises(ValueError, match="is a trace, which runs no policy"):
        adding.add_policy(db, trace.run.job_id, "full")
    with pytest.raises(ValueError, match="is a trace, which has no completions"):
        rescoring.rescore(db, trace.run.job_id)
    with pytest.raises(BadInput, match="a trace needs some"):
        parse_job(traced_spec(world, "reference", exits=None))
    with pytest.raises(BadInput, match="runs none"):
        parse_job(world.fields(trace="reference"))
    with pytest.raises(BadInput, match="field 'policies' is missing"):
        parse_job({name: value for name, value in world.fields().items() if name != "policies"})


def test_grids() -> None:
    """Protects what a grid stands for: every combination once, lists where an option takes lists."""
    asked = parse_replay(
        [
            "full",
            "oracle",
            {"controller": {"exit": [0.5, 0.6], "stop": {"from": 0, "to": 1, "steps": 3}}},
            {"random": {"exit_layers": [2, 4], "shares": [[0.1, 0.2], [0.3, 0.4]]}},
            {"controller": {"exit": 0.5, "stop": 0.0}},
        ]
    )
    found = expand(asked.policies, 10, 3)
    assert found[:2] == [policy("full"), Oracle()]
    pairs = [(0.5, 0.0), (0.5, 0.5), (0.5, 1.0), (0.6, 0.0), (0.6, 0.5), (0.6, 1.0)]
    assert [(one.exit, one.stop) for one in found[2:8]] == pairs
    assert [one.shares for one in found[8:]] == [(0.1, 0.2), (0.3, 0.4)]
    assert MOST_POLICIES >= 1000
    steps = {"from": 0, "to": 1, "steps": 24_000}
    with pytest.raises(BadInput, match=r"24,000 cells, .* about 48 minutes over 1,000,000 tokens at 6 exit points"):
        expand([{"margin": {"threshold": steps}}], 1_000_000, 6)


def test_an_export_brings_a_trace_along(db: Database, of_reference: Trace, tmp_path: Path) -> None:
    """Protects `export` and `import`: in another database the same trace answers the same."""
    import pyarrow.parquet as pq

    from cluster.contents import hashes
    from db.exporting import export_job
    from db.importing import import_job

    folder = tmp_path / "export"
    export_job(db, of_reference.run.job_id, folder, shortstop="test")
    assert pq.read_table(folder / "traces.parquet").num_rows == 48 * 8 * len(of_reference.points)
    with closing(open_database(f"sqlite:///{tmp_path / 'other.db'}")) as other:
        imported = trace_of(other, import_job(other, folder, hashes()).job_id)
        for one, two in zip(next(of_reference.samples()), next(imported.samples()), strict=True):
            assert (one.name, one.prompt_key, one.prompt_tokens) == (two.name, two.prompt_key, two.prompt_tokens)
            for column in one.arrays.__dataclass_fields__:
                assert np.array_equal(getattr(one.arrays, column), getattr(two.arrays, column)), column
        told = replayed(other, imported, {"confidence": {"threshold": 0.5}}).policies[0]
        here = replayed(db, of_reference, {"confidence": {"threshold": 0.5}}).policies[0]
        assert told.figures["tokens_right"] == here.figures["tokens_right"]
        assert "speedup_ideal" not in told.figures  # this record does not know the machine
