"""Calibration: what is promised is kept, what cannot be promised is refused, and the file carries both."""

import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import World
from typer.testing import CliRunner

from cluster import jobs
from cluster.calibrate import quality
from cluster.calibrate.agreement import along_chains, calibrate_agreement, chains_of, losses_of, wrong_tokens
from cluster.calibrate.found import is_faster
from cluster.calibrate.policy_file import spec_of, write_policy_file
from cluster.calibrate.pvalues import betting, fewest_groups, groups_for_quality, hoeffding_bentkus
from cluster.calibrate.quality import calibrate_quality, in_sequence, live_losses, parts_of, screened
from cluster.cli import app
from cluster.grids import ReplaySpec, expand
from cluster.settings import Settings
from cluster.spec import parse_job
from cluster.traced import Trace, trace_of
from db.jobs import runs
from db.records import JobState
from db.results import completions
from db.session import Database, open_database
from engine.errors import BadInput
from engine.replay.traced import Traced

GRID: list[Any] = [{"controller": {"exit": {"from": 0.9, "to": 1.0, "steps": 21}, "stop": 1.0}}]


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    with closing(open_database(f"sqlite:///{tmp_path_factory.mktemp('calibrate') / 'record.db'}")) as opened:
        yield opened


def traced(db: Database, world: World, target: str) -> Trace:
    """Each prompt is a source group of its own."""
    benchmark = {"jsonl": str(world.prompts), "id": "id", "group": "id", "ends": "text"}
    fields = world.fields(trace=target, benchmarks=[benchmark])
    del fields["policies"]
    job_id = jobs.submit(db, parse_job(fields))
    assert jobs.work(db, job_id, inline=True) is JobState.DONE
    return trace_of(db, job_id)


@pytest.fixture(scope="module")
def _of_full(db: Database, world: World) -> Trace:
    return traced(db, world, "full")


@pytest.fixture
def of_full(db: Database, _of_full: Trace) -> Trace:
    """As an imported one: nobody knows what its device class reaches, so speed is depth.

    On a model this small no exit is worth its head, and a calibration that goes by the cost model says so.
    """
    with closing(sqlite3.connect(db.url.removeprefix("sqlite:///"))) as connection:
        connection.execute("DELETE FROM device_class")
        connection.commit()
    assert _of_full.cost_model() is None
    return _of_full


def agreed(trace: Trace, bound: float, grid: list[Any] = GRID) -> Any:
    return calibrate_agreement(trace, ReplaySpec(policies=grid), max_disagree=bound, confidence=0.9)


@given(st.lists(st.sampled_from([-1.0, -0.25, 0.0, 0.1, 0.5, 1.0]), min_size=1, max_size=60), st.floats(0.02, 0.9))
@settings(max_examples=100, deadline=None)
def test_p_values_know_no_order_and_grow_with_losses(losses: list[float], bound: float) -> None:
    """Protects the tests: shuffling groups changes nothing, and more loss never makes a promise surer."""
    values = np.array(losses)
    assert betting(values, bound) == pytest.approx(betting(values[::-1], bound))
    assert betting(np.minimum(values + 0.2, 1), bound) >= betting(values, bound) - 1e-12
    low, high = np.clip([values.mean(), values.mean() + 0.1], 0, 1)
    assert hoeffding_bentkus(high, len(values), bound) >= hoeffding_bentkus(low, len(values), bound) - 1e-12
    if values.mean() >= bound:
        assert groups_for_quality(values, bound, 0.05) is None


@pytest.mark.parametrize("bound", [0.05, 0.3])
@pytest.mark.parametrize("kind", ["betting", "hoeffding-bentkus"])
def test_p_values_are_small_as_rarely_as_they_say(kind: str, bound: float) -> None:
    """Protects the promise at its edge: where the mean loss is the bound itself, p is below 0.1 in 10 % at most."""
    draw = np.random.default_rng(7)
    losses = (draw.random((2_000, 80)) < bound).astype(float)
    if kind == "betting":
        small = np.array([betting(row, bound) for row in losses]) <= 0.1
    else:
        small = np.array([hoeffding_bentkus(row.mean(), 80, bound) for row in losses]) <= 0.1
    assert small.mean() <= 0.1 + 2 * np.sqrt(0.1 * 0.9 / len(small))


def test_how_many_groups_would_do() -> None:
    """Protects the number in a refusal: with that many groups it is kept, with one less it is not."""
    needed = fewest_groups("agreement", 0.05, 0.05)
    assert needed == 59  # 0.95 ** 59 < 0.05 < 0.95 ** 58
    assert hoeffding_bentkus(0, needed, 0.05) <= 0.05 < hoeffding_bentkus(0, needed - 1, 0.05)
    needed = fewest_groups("quality", 0.011, 0.05)
    assert betting(np.zeros(needed), 0.011) <= 0.05 < betting(np.zeros(needed - 1), 0.011)
    some = np.tile([0.0, 0.0, 0.03, -0.02], 5)
    found = groups_for_quality(some, 0.05, 0.05)
    assert found is not None
    assert betting(np.resize(some, found + 20), 0.05) <= 0.05


def test_chains_go_from_the_safest_on() -> None:
    """Protects the multiplicity: a chain is one threshold, in an order that no data decides."""
    grid = [
        {"controller": {"exit": [0.5, 0.9], "stop": [0.8, 1.0]}},
        {"entropy": {"threshold": [0.5, 0.1]}},
        {"confidence": {"threshold": [0.2, 0.8]}},
    ]
    found = expand(grid, 10, 3)
    chains = [[found[place].label for place in chain] for chain in chains_of(found)]
    assert chains == [
        ["controller exit=0.9 stop=0.8", "controller exit=0.5 stop=0.8"],
        ["controller exit=0.9 stop=1", "controller exit=0.5 stop=1"],
        ["entropy threshold=0.1", "entropy threshold=0.5"],
        ["confidence threshold=0.8", "confidence threshold=0.2"],
    ]


def test_a_sequence_ends_with_its_first_failure() -> None:
    """Protects the confidence: what comes after a policy that failed is not tested, however good it looks."""
    losses = np.zeros((3, 200))
    losses[1] = 1.0
    p_values, kept = along_chains(losses, [[0, 1, 2]], 0.2, 0.05)
    assert (set(p_values), kept) == ({0, 1}, {0})
    in_order, count = in_sequence(losses, 0.2, 0.05)
    assert (len(in_order), count) == (2, 1)


def test_agreement_is_what_a_run_does(db: Database, world: World, of_full: Trace, tmp_path: Path) -> None:
    """Protects what is promised: the loss by replay is the share of live completions that differ, to the last one."""
    made = agreed(of_full, 0.9)
    assert made.chosen is not None
    assert made.promise is not None
    assert made.chosen.p_value <= made.promise.level == pytest.approx(0.1)
    file = tmp_path / "calibrated.yaml"
    write_policy_file(made, of_full, file)
    spec = parse_job(yaml.safe_load(file.read_text()))
    assert spec.promise == made.promise
    live = jobs.submit(db, spec)
    assert jobs.work(db, live, inline=True) is JobState.DONE
    full, chosen = runs(db, live)
    written = {
        one.id: [row.outcome.tokens.token_ids.tolist() for row in completions(db, run_id=one.id)]
        for one in (full, chosen)
    }
    differ = [one != two for one, two in zip(written[full.id], written[chosen.id], strict=True)]
    assert np.mean(differ) == pytest.approx(made.chosen.loss)
    assert made.chosen.kept


def test_nothing_is_promised_that_is_not_kept(of_full: Trace) -> None:
    """Protects users of bad exits: a random controller gets no promise, and it is said what would be needed."""
    made = agreed(of_full, 0.06)
    assert made.chosen is None
    assert made.closest is not None
    assert all(not one.kept or not one.faster for one in made.tried)


def test_chains_share_what_may_go_wrong(of_full: Trace) -> None:
    """Protects the confidence where several chains are asked for: each is tested at its part of the level only."""
    both = [*GRID, {"confidence": {"threshold": {"from": 0.5, "to": 1.0, "steps": 3}}}]
    made = agreed(of_full, 0.9, both)
    assert made.promise is not None
    assert made.promise.tested == 2
    assert made.promise.level == pytest.approx(0.1 / 2)
    assert all(one.p_value <= 0.05 for one in made.tried if one.kept)
    assert {one.kept for one in made.tried if one.p_value is not None and one.p_value > 0.05} <= {False}


def test_what_reads_as_full_depths_speed_is_not_promised() -> None:
    """Protects users from a promise for nothing: 1.00× is not faster, whatever digits follow."""
    assert [is_faster(speed) for speed in (0.9, 1.0, 1.004, 1.006)] == [False, False, False, True]


def test_a_promise_stays_with_what_it_was_given_for(db: Database, of_full: Trace) -> None:
    """Protects readers of a promise: another threshold, length, model or other weights are refused under its name."""
    spec = spec_of(agreed(of_full, 0.9), of_full)
    with pytest.raises(BadInput, match="which is not among the policies"):
        parse_job(spec | {"policies": ["full", {"controller": {"exit": 0.123, "stop": 1.0, "kv": "recompute"}}]})
    with pytest.raises(BadInput, match=r"generation.max_new_tokens is 9, and the promise was given for 8"):
        parse_job(spec | {"generation": spec["generation"] | {"max_new_tokens": 9}})
    for field in ("weights_hash", "exits_hash"):
        other = parse_job(spec | {"promise": spec["promise"] | {field: "0" * 64}})
        with pytest.raises(BadInput, match=f"promise: it was given for {field} 000000000000"):
            jobs.validate(other)
    jobs.validate(parse_job(spec))


@pytest.mark.parametrize("kind", ["agreement", "quality"])
def test_a_promise_is_rarely_broken(of_full: Trace, kind: str) -> None:
    """Protects the confidence: groups of a real trace drawn anew a thousand times, held against the whole of it.

    The bound lies just below the loss of a policy in the middle, where a promise is broken most easily.
    """
    policies = [one.model_copy(update={"kv": "recompute"}) for one in expand(GRID, 1, 1)]
    _, losses = losses_of(of_full, policies, wrong_tokens)
    chains, draw, broken, given = chains_of(policies), np.random.default_rng(3), 0, 0
    means = losses.mean(1)
    bound = float(np.sort(means[means > 0.1])[0]) - 1e-6
    order = chains[0]
    for _ in range(1_000):
        drawn = losses[:, draw.integers(0, losses.shape[1], 100)]
        if kind == "agreement":
            kept = along_chains(drawn, chains, bound, 0.05)[1]
        else:
            kept = set(order[: in_sequence(drawn[order], bound, 0.05)[1]])
        broken += any(means[place] > bound for place in kept)
        given += bool(kept)
    assert given > 500
    assert broken / 1_000 <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 1_000)


def test_quality(db: Database, of_full: Trace) -> None:
    """Protects the three parts: what is tested was made live, on other groups than those that chose and that report."""
    parts = parts_of(of_full)
    everyone = np.concatenate([parts.screen, parts.test, parts.report])
    assert sorted(everyone.tolist()) == list(range(48))
    assert len(parts.test) == 26
    made = calibrate_quality(
        db,
        of_full,
        ReplaySpec(policies=[{"controller": {"exit": [0.4, 0.5, 0.6], "stop": 1.0}}]),
        metric="es",
        max_loss=0.9,
        confidence=0.9,
        settings=Settings(),
        inline=True,
    )
    assert made.live_job is not None
    assert made.groups == 26
    order = [one.policy for one in made.tried]
    assert order == sorted(order, reverse=True)  # the safest first
    assert made.tried[0].kept
    by_policy = {run.policy: run for run in runs(db, made.live_job)}
    for one in made.tried:
        losses = live_losses(db, of_full, by_policy[one.policy], "es", 1.0).of(parts.test)
        assert one.loss == pytest.approx(losses.mean())
        assert one.p_value == pytest.approx(betting(losses, 0.9), rel=1e-6, abs=0)
    scores = {
        name: {row.sample.source_group: row.scores["es"] for row in completions(db, run_id=by_policy[name].id)}
        for name in ("full", order[0])
    }
    names = [of_full.groups[place] for place in parts.test]
    expected = np.mean([scores["full"][name] - scores[order[0]][name] for name in names])
    assert made.tried[0].loss == pytest.approx(expected)
    if made.promise is not None:
        assert made.promise.held_out is not None
        assert made.promise.held_out.groups == len(parts.report)


class Broken(Trace):
    """A trace in which some source groups never leave and are never right."""

    broken: Any = ()

    def numbered_pieces(self) -> Iterator[tuple[Traced, list[int]]]:
        for piece, positions in super().numbered_pieces():
            here = np.repeat(np.isin(piece.groups, self.broken), piece.lengths)
            controller, tokens = piece.controller.copy(), piece.tokens.copy()
            controller[:, :, here] = 0.0
            tokens[:-1, here] = -1
            yield replace(piece, controller=controller, tokens=tokens), positions


def test_screening_sees_its_own_part_only(of_full: Trace) -> None:
    """Protects the test: what the groups say that test and report has no part in which policies they meet."""
    parts = parts_of(of_full)
    asked = ReplaySpec(policies=[{"controller": {"exit": [0.9, 0.95, 0.97, 0.98, 1.0], "stop": 1.0}}])

    def found(*broken: Any) -> list[tuple[str, Any]]:
        trace = Broken(of_full.db, of_full.run, of_full.pinned, of_full.groups)
        object.__setattr__(trace, "broken", np.concatenate([*broken, np.array([], int)]))
        return [(row.policy, row.figures["mean_exit_layer"]) for row, _ in screened(trace, asked, parts.screen)]

    assert found() == found(parts.test, parts.report) != found(parts.screen)
    assert "controller exit=1 stop=1" not in [policy for policy, _ in found()]  # as fast as full depth is not faster


def test_each_part_has_one_task_and_speed_is_measured(
    db: Database, of_full: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the promise: A screens, B tests, C reports; what is slow live is not promised."""
    parts, seen = parts_of(of_full), []
    asked = ReplaySpec(policies=[{"controller": {"exit": [0.9, 0.95, 0.97, 0.98], "stop": 1.0}}])
    safest, *others = [row.policy for row, _ in screened(of_full, asked, parts.screen)]
    assert others

    def seeing(trace: Trace, asked: ReplaySpec, part: Any, *more: Any) -> Any:
        seen.append(part.tolist())
        return screened(trace, asked, part, *more)

    monkeypatch.setattr(quality, "screened", seeing)
    monkeypatch.setattr(quality, "_measured", lambda run: 1.2 if run.policy == safest else 0.9)
    made = calibrate_quality(
        db, of_full, asked, metric="es", max_loss=0.9, confidence=0.9, settings=Settings(), inline=True
    )
    assert seen == [parts.screen.tolist()]
    assert [one.faster for one in made.tried] == [True, *(False for _ in others)]
    assert made.chosen is not None
    assert made.chosen.policy == safest
    assert made.promise is not None
    assert made.promise.held_out is not None
    assert made.live_job is not None
    [run] = [run for run in runs(db, made.live_job) if run.policy == made.chosen.policy]
    losses = live_losses(db, of_full, run, "es", 1.0)
    assert made.promise.held_out.loss == pytest.approx(losses.of(parts.report).mean())
    assert losses.of(parts.report).mean() != pytest.approx(losses.of(parts.test).mean()), "the test would see nothing"


def test_command_line(db: Database, of_full: Trace, tmp_path: Path) -> None:
    """Protects the command: a promise and its file, a refusal with exit code 1 or 3, bad input with 2."""
    job, grid = str(of_full.run.job_id), json.dumps(GRID[0])
    asked = ["calibrate", job, "-p", grid, "--confidence", "0.9", "--database", db.url]
    file = tmp_path / "calibrated.yaml"
    kept = CliRunner().invoke(app, [*asked, "--max-disagree", "0.9", "--out", str(file), "--json"])
    assert kept.exit_code == 0, kept.output
    assert json.loads(kept.stdout)["promise"]["bound"] == 0.9
    assert "With 90 % confidence" in file.read_text()
    assert CliRunner().invoke(app, ["validate", str(file)]).exit_code == 0
    again = CliRunner().invoke(app, ["trace", str(file), "--inline", "--database", f"sqlite:///{tmp_path / 'own.db'}"])
    assert again.exit_code == 0, again.output  # the policy is left aside, and the promise with it
    refused = CliRunner().invoke(app, [*asked, "--max-disagree", "0.06"])
    assert refused.exit_code in (1, 3)
    assert "nothing is promised: " in refused.stderr
    for options, sentence in [
        ([], "give one promise"),
        (["--max-disagree", "0.5", "--max-loss", "0.1"], "give one promise"),
        (["--max-loss", "0.1"], "go together"),
        (["--max-disagree", "2"], "max-disagree is 2"),
        (["--max-disagree", "0.01"], "48 source groups cannot promise that"),
        (["--metric", "es", "--max-loss", "0.01"], "26 source groups cannot promise that"),
        (["--metric", "es", "--max-loss", "1"], "max-loss is 1"),
        (["--metric", "first_divergence", "--max-loss", "1"], "'first_divergence' cannot be promised"),
        (["--metric", "rouge", "--max-loss", "0.1"], "rouge"),
        (["--max-disagree", "0.5", "-p", "{sec: {exit: 0.5, stop: 1.0}}"], "under kv: recompute only"),
        (["--max-disagree", "0.5", "-p", "{fixed: {exit_layer: 3}}"], "no exit point"),
        (["--max-disagree", "0.5", "-p", "oracle"], "'oracle': agreement is promised under kv: recompute only"),
        (["--confidence", "2", "--max-disagree", "0.5"], "confidence is 2"),
    ]:
        bad = CliRunner().invoke(app, [*asked, *options])
        assert bad.exit_code == 2, (options, bad.output)
        assert sentence in bad.stderr, (options, bad.stderr)
    for_others = "{policies: [{confidence: {threshold: 0.5}}], exits_hash: abc}"
    for promise in (["--max-disagree", "0.5"], ["--metric", "es", "--max-loss", "0.9"]):
        bad = CliRunner().invoke(app, ["calibrate", job, "-p", for_others, "--database", db.url, *promise])
        assert bad.exit_code == 2, bad.output
        assert "exits_hash: the policies are for 'abc'" in bad.stderr


def test_an_interrupted_calibration_goes_on(db: Database, of_full: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects hours of live runs: Ctrl-C is one sentence, and the same command goes on with the job that it began."""
    job, grid = str(of_full.run.job_id), json.dumps({"controller": {"exit": [0.91, 0.96], "stop": 1.0}})
    asked = ["calibrate", job, "-p", grid, "--metric", "es", "--max-loss", "0.9", "--confidence", "0.9", "--inline"]

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "work", interrupted)
        told = CliRunner().invoke(app, [*asked, "--database", db.url])
    assert told.exit_code == 130, told.output
    begun = re.search(r"^job (\d+): interrupted; the same command goes on with it$", told.stderr, re.MULTILINE)
    assert begun is not None, told.stderr
    again = CliRunner().invoke(app, [*asked, "--database", db.url, "--json"])
    assert json.loads(again.stdout)["live_job"] == int(begun[1])
    assert "evaluating: " in again.stderr


def test_agreement_needs_full_depths_own_completions(db: Database, world: World) -> None:
    """Protects the promise: on references a replay knows nothing of what full depth would have written."""
    with pytest.raises(BadInput, match="trace of references"):
        agreed(traced(db, world, "reference"), 0.9)
