"""compare and gate on real jobs of a tiny model: what is found, what is refused, what is asked again."""

import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from compared_world import Compared, build
from small_world import World
from typer.testing import CliRunner, Result

from cluster.cli import app
from cluster.comparing.build import compare
from cluster.comparing.confirming import again, confirm, settle
from cluster.comparing.model import Comparison
from cluster.comparing.noise import Floors
from cluster.comparing.sides import parse_side
from cluster.gates import Outcome, Verdict, parse_gate
from cluster.local import Local
from cluster.service import Service
from cluster.settings import load_settings
from db import jobs, noise
from db.noise import NoisePair
from db.records import JobState
from db.session import Database, open_database
from db.tables import job as job_table
from workers.differences import noise_floor


@pytest.fixture(scope="module")
def scene(world: World, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    return build(world, tmp_path_factory.mktemp("compared"))


def call(scene: Compared, *arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments), "--database", scene.url])


def compared(scene: Compared, *sides: object, **options: Any) -> Comparison:
    database = open_database(scene.url)
    try:
        return compare(database, *(parse_side(str(side)) for side in sides), **options)
    finally:
        database.close()


def gate_file(folder: Path, *rules: dict[str, Any], **more: Any) -> Path:
    file = folder / "gate.yaml"
    file.write_text(yaml.safe_dump({"rules": list(rules)} | more))
    return file


def test_the_same_spec_twice_differs_in_nothing_but_time(scene: Compared) -> None:
    found = compared(scene, scene.good, scene.again)
    assert [pair.policy_b for pair in found.pairs] == ["full", "careful"]
    assert found.changed == []
    for pair in found.pairs:
        assert pair.same_spec
        assert (pair.samples, pair.unpaired, pair.errors_b) == (48, 0, 0)
        assert (pair.agreement.exact, pair.agreement.tokens, pair.agreement.diverging) == (1.0, 1.0, 0)
        for one in pair.differences:
            if one.kind == "quality":
                assert (one.change.value, one.change.low, one.change.high, one.p_value) == (0, 0, 0, 1)
            else:
                assert one.floor is not None
                assert one.floor.share is None  # the only pair of runs is the one that is looked at
        assert pair.moved == pair.diverged == []


def test_a_policy_that_leaves_too_early_is_found_with_its_samples(scene: Compared) -> None:
    found = compared(scene, scene.good, f"{scene.worse}:careful")
    pair = found.pairs[1]
    assert (pair.policy_a, pair.policy_b, pair.same_spec) == ("careful", "careful", False)
    assert pair.notes[-1].startswith("The policy of that name is another one: {'confidence': {")
    [es] = pair.difference("es")
    assert es.change.high is not None
    assert es.change.high < -0.2
    assert es.p_holm is not None
    assert es.p_holm < 0.01
    assert es.groups == 24
    [accepted] = pair.difference("accepted")
    [flips] = [one for one in pair.flips if one.metric == "accepted"]
    assert accepted.mcnemar is not None
    assert (accepted.mcnemar.lost, accepted.mcnemar.gained) == (flips.n_lost, flips.n_gained)
    assert flips.n_lost == len(flips.lost) > 30
    assert pair.agreement.diverging > 30
    assert sum(pair.agreement.first_divergence.values()) == pair.agreement.diverging
    assert pair.moved[0].b < pair.moved[0].a
    assert len(pair.diverged) == pair.agreement.diverging


def test_two_policies_of_one_job_were_timed_in_turns(scene: Compared) -> None:
    alone = compared(scene, scene.worse)
    named = compared(scene, f"{scene.worse}:full", f"{scene.worse}:confidence")
    assert alone.pairs == named.pairs
    [speed] = alone.pairs[0].difference("speedup_token")
    assert speed.floor is not None
    assert speed.floor.share == 0.0


def test_runs_are_sides_too(scene: Compared) -> None:
    database = open_database(scene.url)
    a, b = jobs.runs(database, scene.good)[0], jobs.runs(database, scene.worse)[0]
    database.close()
    found = compared(scene, f"run:{a.id}", f"run:{b.id}", metrics=["es"])
    assert [(pair.run_a, pair.run_b) for pair in found.pairs] == [(a.id, b.id)]
    assert [one.metric for one in found.differences] == ["es"]


def test_pairs_of_the_same_spec_make_the_noise_floor(scene: Compared) -> None:
    """Two runs of `full` with the same spec are known besides B's: one pair, which tells next to nothing."""
    found = compared(scene, scene.again, scene.worse)
    [speed] = found.pairs[0].difference("speedup_token")
    assert speed.floor is not None
    assert speed.floor.pairs == 1
    assert speed.floor.share is not None
    database = open_database(scene.url)
    [pair] = noise.pairs_of(database, found.pairs[0].content_hash, "full")
    database.close()
    assert 1 - speed.floor.share <= 2.718 ** -abs(pair.log_token) * 1.001
    assert not speed.paced, "full depth has only the clock"
    assert found.pairs[1].difference("speedup_token")[0].paced
    against_full = compared(scene, f"{scene.again}:confidence", f"{scene.worse}:full", metrics=["speedup_token"])
    [speed] = against_full.pairs[0].differences
    assert speed.paced
    assert speed.floor is not None
    assert speed.floor.pairs == 1, "of the policy: full depth has no pairs of this kind"


def test_floors_of_the_clock_and_of_full_depth_are_kept_apart(scene: Compared) -> None:
    """Protects an alarm from a floor of another kind, and a pair that only has the clock from counting as one."""
    database = open_database(scene.url)
    a, b = jobs.runs(database, scene.good)[1], jobs.runs(database, scene.worse)[1]
    database.close()
    pairs = [
        NoisePair(901, 902, "cpu", "hash", "confidence", 0.2, 0.3, 0.02, 0.03),
        NoisePair(903, 904, "cpu", "hash", "confidence", 0.2, 0.3),
    ]
    known = Floors(pairs, a, b)
    clock, paced = (known.of("speedup_token", "cpu", paced=kind) for kind in (False, True))
    assert (clock.pairs, paced.pairs) == (2, 1)
    assert clock.share == noise_floor([0.2, 0.2])
    assert paced.share == noise_floor([0.02])
    assert known.of("speedup_request", "cpu", paced=True).share == noise_floor([0.03])


@pytest.mark.parametrize(
    ("sides", "sentence"),
    [
        (("{good}", "{other}"), "has other samples in job {good} (hash "),
        (("{good}", "{good}"), "are the same run; name two jobs, or two policies of one."),
        (("99", "{good}"), "job 99 does not exist"),
        (("run:99", "{good}"), "run 99 does not exist"),
        (("{good}:ful", "{worse}"), "unknown policy 'ful'; did you mean 'full'?"),
        (("first", "{good}"), "side 'first' is no job; give one like 12, a policy of it like 12:full"),
        (("1", None), "job 1 has no policy but full; name a second job to hold it against."),
        (("1", "{good}"), "jobs 1 and {good} share no benchmark"),
        (("{good}", "{worse}", "--metric", "rouge"), "unknown metric 'rouge'"),
    ],
)
def test_what_cannot_be_compared_is_refused(scene: Compared, sides: tuple[str | None, ...], sentence: str) -> None:
    numbers = {name: getattr(scene, name) for name in ("good", "other", "worse")}
    done = call(scene, "compare", *(side.format(**numbers) for side in sides if side is not None))
    assert done.exit_code == 2
    assert sentence.format(**numbers) in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_job_that_is_not_done_is_refused(scene: Compared, db: Database) -> None:
    from cluster import jobs as cluster_jobs

    waiting = cluster_jobs.submit(db, scene.world.spec())
    done = CliRunner().invoke(app, ["compare", str(waiting), "--database", db.url])
    assert done.exit_code == 2
    assert f"job {waiting} is preparing; only a job that is done can be compared." in done.stderr


def test_compare_prints_words_and_json(scene: Compared) -> None:
    done = call(scene, "compare", scene.good, scene.worse)
    assert done.exit_code == 0
    assert "Beyond chance: accepted" in done.stdout
    assert all(len(line) <= 100 for line in done.stdout.splitlines())
    told = json.loads(call(scene, "compare", scene.good, scene.worse, "--json").stdout)
    assert Comparison.model_validate(told).b.job_id == scene.worse


def test_a_gate_passes_and_says_so_by_its_exit_code(scene: Compared, tmp_path: Path) -> None:
    file = gate_file(tmp_path, {"metric": "es", "max_loss": 0.02}, {"metric": "errors", "max_loss": 0})
    done = call(scene, "gate", file, scene.good, scene.again)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("pass\nAll 4 rules hold.")


def test_a_failure_is_asked_again_on_fresh_samples(scene: Compared, tmp_path: Path) -> None:
    """The two jobs draw others of the 96, which show the same."""
    rules = [{"metric": "es", "max_loss": 0.02}, {"metric": "accepted", "min": 0.5, "policy": "careful"}]
    file = gate_file(tmp_path, *rules)
    reports = {"--junit": tmp_path / "gate.xml", "--markdown": tmp_path / "gate.md"}
    arguments = [part for option in reports.items() for part in option]
    done = call(scene, "gate", file, scene.good, scene.worse, "--inline", "--json", *arguments)
    assert done.exit_code == 1, done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["confirmation"].endswith("2 of 2 failures show again.")
    fresh = int(verdict["confirmation"].split(" and ")[1].split(")")[0])
    database = open_database(scene.url)
    [asked] = jobs.job(database, fresh).spec["benchmarks"]
    database.close()
    assert asked["seed"] == 1
    assert verdict["rules"][0]["sentence"].endswith("It shows again on fresh samples.")

    suite = ElementTree.parse(reports["--junit"]).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("3", "2")
    assert "❌ Shortstop gate: fail" in reports["--markdown"].read_text()


def test_fresh_samples_hold_none_that_were_used(scene: Compared) -> None:
    """Half of the 96 are drawn each time, so that about half of a second draw are new."""
    whole = compared(scene, scene.good, scene.worse)
    nothing = compared(scene, scene.good, scene.worse, without=scene.good)
    assert whole.pairs[0].samples == 48
    assert nothing.pairs[0].samples == 0
    assert {one.kind for one in nothing.differences} == {"quality"}


@contextmanager
def failed(scene: Compared, folder: Path, job_id: int, column: str, change: Any) -> Iterator[tuple[Service, Verdict]]:
    """A failure, on a copy of the record in which one job's spec, or what it pins, is another."""
    copied = folder / "record.db"
    with (
        closing(sqlite3.connect(scene.url.removeprefix("sqlite:///"))) as whole,
        closing(sqlite3.connect(copied)) as copy,
    ):
        whole.backup(copy)
    with closing(open_database(f"sqlite:///{copied}")) as db:
        value = change(getattr(jobs.job(db, job_id), column))
        with db.write() as connection:
            connection.execute(job_table.update().where(job_table.c.id == job_id).values({column: value}))
        service = Local(load_settings(), db)
        verdict = service.judge(GATE, str(scene.good), str(scene.worse))
        assert len(verdict.failed) == 1
        yield service, verdict


GATE = parse_gate({"rules": [{"metric": "es", "max_loss": 0.02}]})


def test_a_job_of_other_weights_confirms_nothing(scene: Compared, tmp_path: Path) -> None:
    """A model that was replaced meanwhile would be asked in place of the one that failed."""
    with failed(scene, tmp_path, scene.again, "pinned", lambda pinned: pinned | {"weights_hash": "x"}) as (
        service,
        verdict,
    ):
        [asked] = again(service, verdict)
        assert asked.kind == "quality"
        told = settle(service, GATE, verdict, asked, scene.good, scene.again)
        sentence = f"Not confirmed: weights_hash of job {scene.again} is not as in job {scene.worse}."
        assert (told.outcome, told.confirmation) == (Outcome.FAIL, sentence)


def test_a_failure_stands_where_it_cannot_be_asked_again(scene: Compared, tmp_path: Path) -> None:
    """Jobs that do not come to their end; a benchmark that has no more samples than were drawn."""
    with failed(scene, tmp_path, scene.worse, "name", lambda name: name) as (service, verdict):
        told = confirm(service, GATE, verdict, lambda job_id: JobState.FAILED)
        assert told.outcome is Outcome.FAIL
        assert told.confirmation is not None
        assert re.fullmatch(r"Not confirmed: job \d+ or its fellow is failed\.", told.confirmation)

    def whole(spec: dict[str, Any]) -> dict[str, Any]:
        return spec | {"benchmarks": [one | {"samples": None} for one in spec["benchmarks"]]}

    with failed(scene, tmp_path, scene.worse, "spec", whole) as (service, verdict):
        told = confirm(service, GATE, verdict, lambda job_id: pytest.fail("no job is needed for that"))
        sentence = "Not confirmed: the benchmark has no samples beside those it drew."
        assert (told.outcome, told.confirmation) == (Outcome.FAIL, sentence)


def test_a_gate_that_cannot_tell_ends_with_three(scene: Compared, tmp_path: Path) -> None:
    """Speed, of which only one pair of runs is known."""
    file = gate_file(tmp_path, {"metric": "speedup_token", "max_loss": 0.01})
    done = call(scene, "gate", file, scene.good, scene.worse, "--no-confirm")
    assert done.exit_code == 3
    assert done.stdout.startswith("inconclusive")
    strict = gate_file(tmp_path, {"metric": "speedup_token", "max_loss": 0.01}, on_inconclusive="fail")
    done = call(scene, "gate", strict, scene.good, scene.worse, "--no-confirm")
    assert done.exit_code == 1
    assert "The gate counts that as fail." in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[1]", "does not hold a mapping"),
        ("rules: []", "field 'rules' is []"),
        ("rules: [{metric: es}]", "rule for 'es': give one of max_loss and min"),
        ("rules: [{metric: es, max_loss: 0.1, min: 0.2}]", "rule for 'es': give one of max_loss and min"),
        ("rules: [{metric: es, max_loss: -1}]", "field 'rules.0.max_loss' is -1"),
        ("rules: [{metric: es, max_loss: 0.1, margn: 1}]", "field 'rules.0.margn' is not known here"),
        ("rules: [{metric: e, max_loss: 0.1}]", "unknown metric 'e'"),
        ("rules: [{metric: es, max_loss: 0.1, policy: carefull}]", "did you mean 'careful'?"),
        ("rules: [{metric: es, max_loss: 0.1, benchmark: none}]", "unknown benchmark 'none'"),
        ("confidence: 2\nrules: [{metric: es, max_loss: 0.1}]", "field 'confidence' is 2"),
        ("rules: [{metric: speedup_token, max_loss: 0.1, scale: absolute}]", "scale is 'absolute'"),
        ("rules: [{metric: errors, min: 0.9}]", "rule for 'errors': fewer are better, so that they have no min"),
    ],
)
def test_a_gate_file_that_makes_no_sense_is_refused(
    scene: Compared, tmp_path: Path, content: str, sentence: str
) -> None:
    file = tmp_path / "gate.yaml"
    file.write_text(content)
    done = call(scene, "gate", file, scene.good, scene.again)
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_nothing_is_run_where_nothing_changed(scene: Compared, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(json.dumps(scene.fields))
    done = call(scene, "run", spec, "--inline", "--if-changed")
    assert done.exit_code == 0, done.stderr
    assert f"job {scene.again}: nothing changed since; this is its report" in done.stderr
    changed = call(scene, "run", spec, "--inline", "--if-changed", "-O", "generation.max_new_tokens=6")
    assert changed.exit_code == 0, changed.stderr
    assert "submitted" in changed.stderr
