"""The study of a trace: its counts are those of a plain loop, and continuations are what full depth writes."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_world import World
from typer.testing import CliRunner

from cluster import jobs
from cluster.cli import app
from cluster.settings import Settings
from cluster.spec import parse_job
from cluster.study.counting import share
from cluster.study.kinds import kinds_of, text_before
from cluster.study.report import Study, study
from cluster.traced import Trace, trace_of
from db.labels import Label, keep_labels
from db.records import JobState
from db.results import completions
from db.session import Database, open_database
from engine.errors import BadInput


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    with closing(open_database(f"sqlite:///{tmp_path_factory.mktemp('study') / 'record.db'}")) as opened:
        yield opened


def traced(db: Database, world: World, **changes: Any) -> Trace:
    fields = world.fields(**({"trace": "reference"} | changes))
    del fields["policies"]
    job_id = jobs.submit(db, parse_job(fields))
    assert jobs.work(db, job_id, inline=True) is JobState.DONE
    return trace_of(db, job_id)


@pytest.fixture(scope="module")
def trace(db: Database, world: World) -> Trace:
    return traced(db, world)


def test_counts_are_those_of_a_plain_loop(trace: Trace) -> None:
    """Protects every number: first right, right, never, positions and agreement, token by token."""
    found = study(trace, Settings()).counted
    p, tokens = len(trace.points), 0
    first, right, never, agree = np.zeros(p), np.zeros(p), 0, np.zeros((p, p))
    third_never = 0
    for window in trace.samples(7):
        for one in window:
            for place, target in enumerate(one.arrays.targets):
                chosen = one.arrays.tokens[:, place]
                hits = [point for point in range(p) if chosen[point] == target]
                tokens += 1
                never += not hits
                third_never += not hits and place == 2
                right[hits] += 1
                if hits:
                    first[hits[0]] += 1
                agree += chosen[:, None] == chosen[None]
    assert found.overall.tokens == tokens == 48 * 8
    assert [one.value for one in found.overall.first_right] == pytest.approx((first / tokens).tolist())
    assert [one.value for one in found.overall.right] == pytest.approx((right / tokens).tolist())
    assert found.overall.never.value == pytest.approx(never / tokens)
    assert sum(one.value for one in found.overall.first_right) + found.overall.never.value == pytest.approx(1)
    assert np.allclose(found.agreement, agree / tokens)
    assert [one.name for one in found.positions] == [str(place) for place in range(1, 9)]
    assert found.positions[2].never.value == pytest.approx(third_never / 48)
    assert [one.name for one in found.languages] == ["python"]
    assert sum(one.tokens for one in found.kinds) == tokens
    assert found.overall.never.low <= found.overall.never.value <= found.overall.never.high


def test_intervals_are_over_groups() -> None:
    """Protects the intervals: groups that are copies of samples are worth one sample each."""
    part, whole = np.array([0, 1, 0, 1, 1, 0, 1, 0.0]), np.ones(8)
    assert share(part * 10, whole * 10) == share(part, whole)
    assert share(part[:5], whole[:5]).low is None


@pytest.mark.parametrize(
    ("before", "pieces", "kinds"),
    [
        ("def f(x):\n    ", ["return", " x", " +", " ", "1", "\n"], "keyword name operator space number space"),
        ("x = ", ['"a', " b", '"', "  # no", "te"], "string string string comment comment"),
        ("y = (", ["1", ",", " None", ")"], "number punctuation keyword punctuation"),
    ],
)
def test_kinds_of_tokens(before: str, pieces: list[str], kinds: str) -> None:
    """Protects the kinds: what is open in front of a token is known."""
    expected = [kind.replace("space", "white space") for kind in kinds.split()]
    assert kinds_of(before, pieces, "python") == expected
    assert set(kinds_of(before, pieces, "no such language")) <= {"other", "white space"}


def test_where_a_target_stands() -> None:
    """Protects the place: white space that the target begins with is taken back from the prompt, and nothing else."""
    assert text_before("a\n    ", "    return") == "a\n"
    assert text_before("a\n    ", "return") == "a\n    "
    assert text_before("a", " b") == "a"


@pytest.fixture(scope="module")
def continued(trace: Trace) -> Study:
    return study(trace, Settings(), continue_samples=24, inline=True)


def test_continuations(db: Database, trace: Trace, world: World, continued: Study) -> None:
    """Protects what is generated from: the reference up to a token, then full depth's wrong one, or the right one."""
    found = continued.continued
    assert found is not None
    rows = list(completions(db, job_id=found.job_id))
    assert found.wrong.completions + found.right.completions == len(rows)
    assert found.wrong.completions > 5
    originals = {one["id"]: one for one in map(json.loads, world.prompts.read_text().splitlines())}
    for row in rows:
        name, step, arm = row.sample.name.split()
        whole = originals[name]["prompt"] + originals[name]["reference"]
        assert whole.endswith(row.sample.reference)
        right_so_far = whole.removesuffix(row.sample.reference)
        assert int(step) <= 8
        assert (row.sample.prompt == right_so_far) == (arm == "right")
        assert row.sample.source_group == originals[name]["file"]
    value = np.mean([row.scores["es"] for row in rows if row.sample.name.endswith(" wrong")])
    assert found.wrong.scores["es"].value == pytest.approx(value)


def test_what_people_said_of_continuations(db: Database, trace: Trace, continued: Study) -> None:
    """Protects the 4.2 %: each arm's share of what judges accept, over what was judged, long after it was made."""
    made = continued.continued
    assert made is not None
    assert "acceptance_rate" not in made.wrong.scores
    rows = list(completions(db, job_id=made.job_id))
    wrong = [row for row in rows if row.sample.name.endswith(" wrong")][:4]
    right = [row for row in rows if row.sample.name.endswith(" right")][:3]
    said = [Label(row.sample.id, row.outcome.text or "", row in (wrong[0], *right)) for row in (*wrong, *right)]
    keep_labels(db, made.job_id, "ann", said)
    keep_labels(db, made.job_id, "bob", [Label(wrong[0].sample.id, wrong[0].outcome.text or "", False)])
    again = study(trace, Settings(), continued_job=made.job_id).continued
    assert again is not None
    assert again.wrong.scores["acceptance_rate"].value == pytest.approx(0.5 / 4)
    assert again.right.scores["acceptance_rate"].value == 1
    assert again.wrong.scores["es"] == made.wrong.scores["es"]
    told = CliRunner().invoke(
        app, ["study", str(trace.run.job_id), "--continued", str(made.job_id), "--database", db.url]
    )
    assert told.exit_code == 0, told.output
    assert "accepted by people" in told.stdout
    with pytest.raises(BadInput, match=r"does not continue the trace of job \d+ on .*; make one that does"):
        study(trace, Settings(), continued_job=trace.run.job_id)


def test_bad_input(db: Database, world: World, trace: Trace) -> None:
    """Protects users: what cannot be continued or executed is said in one sentence, before anything is generated."""
    counted: list[int] = []
    with pytest.raises(BadInput, match="in which no token is wrong"):
        study(traced(db, world, trace="full"), Settings(), continue_samples=4, inline=True, on_progress=counted.append)
    assert not counted
    with pytest.raises(BadInput, match="has no tests to execute"):
        study(trace, Settings(), continue_samples=4, execute=True, inline=True)
    alone = CliRunner().invoke(app, ["study", str(trace.run.job_id), "--execute", "--database", db.url])
    assert alone.exit_code == 2
    assert "give --continue N as well" in alone.stderr


def test_command_line(db: Database, trace: Trace, continued: Study, tmp_path: Path) -> None:
    """Protects the command: a table, JSON, and a page that holds all pictures."""
    asked = ["study", str(trace.run.job_id), "--database", db.url]
    page = tmp_path / "study.html"
    told = CliRunner().invoke(app, [*asked, "--html", str(page)])
    assert told.exit_code == 0, told.output
    assert "wrong at every exit point: " in told.stdout
    assert page.read_text().count('data-figure="') == 4
    plain = CliRunner().invoke(app, [*asked, "--json"])
    assert json.loads(plain.stdout)[0]["counted"]["overall"]["tokens"] == 48 * 8
