"""The page of a replay in a real browser: its numbers are the replay's own, wherever the sliders stand."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from axe import serious_findings
from browser import Browser, find_browser
from served import serving
from small_world import World

from cluster import jobs
from cluster.grids import ReplaySpec, default_policies
from cluster.replays import ReplayedPolicy, replay_trace
from cluster.reports.replay_page import write_replay_page
from cluster.spec import parse_job
from cluster.traced import Trace, trace_of
from db.keys import create_key
from db.records import JobState
from db.session import open_database

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def trace(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trace]:
    fields = {name: value for name, value in world.fields(trace="reference").items() if name != "policies"}
    with closing(open_database(f"sqlite:///{tmp_path_factory.mktemp('replay') / 'record.db'}")) as db:
        job_id = jobs.submit(db, parse_job(fields))
        assert jobs.work(db, job_id, inline=True) is JobState.DONE
        yield trace_of(db, job_id)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


def slide(browser: Browser, kind: str, **thresholds: float) -> dict[str, Any]:
    """Choose a policy and its thresholds; what the page then says."""
    moves = [f"document.getElementById('kind').value = '{kind}'"]
    moves += [f"document.getElementById('{name}').value = {value * 1000}" for name, value in thresholds.items()]
    moves.append("document.getElementById('kind').dispatchEvent(new Event('input', {bubbles: true}))")
    browser.evaluate("; ".join(moves))
    return browser.evaluate("window.replayed")


def replayed(trace: Trace, said: dict[str, Any]) -> ReplayedPolicy:
    return replay_trace(trace, ReplaySpec(policies=[{said["kind"]: said["thresholds"]}])).policies[0]


def assert_same(said: dict[str, Any], told: ReplayedPolicy) -> None:
    """But for what 16 bits leave open: at most one token in a hundred."""
    names = {"speed": "speedup_ideal", "right": "tokens_right", "agree": "agreement", "layer": "mean_exit_layer"}
    for name, figure in (names | {"stopped": "stop_share", "lift": "stop_lift"}).items():
        value = told.figures[figure].value
        assert said[name] == (None if value is None else pytest.approx(value, rel=0.01)), (name, said)


def test_sliders_say_what_the_replay_says(trace: Trace, browser: Browser, tmp_path: Path) -> None:
    """Protects the arithmetic in the browser: decisions, sums, stops and the cost model, kind by kind, in the file."""
    page = tmp_path / "replay.html"
    write_replay_page(trace, replay_trace(trace, ReplaySpec(policies=default_policies(trace.pinned))), page)
    browser.open(page)
    browser.wait_for("document.querySelectorAll('#replay-chart .point').length > 10")
    moved = set()
    for kind, places in {
        "confidence": [{"threshold": 0.1}, {"threshold": 0.4}, {"threshold": 0.9}],
        "margin": [{"threshold": 0.2}],
        "entropy": [{"threshold": 0.2}, {"threshold": 0.3}],
        "state-similarity": [{"threshold": 0.7}],
        "controller": [{"exit": 0.4, "stop": 0.5}, {"exit": 0.6, "stop": 0.4}, {"exit": 1.0, "stop": 0.0}],
    }.items():
        for thresholds in places:
            said = slide(browser, kind, **thresholds)
            assert_same(said, replayed(trace, said))
            moved.add((round(said["speed"], 3), round(said["layer"], 3)))
    assert len(moved) >= 5  # random heads: some thresholds do the same
    assert browser.evaluate("document.getElementById('now-policy').textContent") == "{controller: {exit: 1, stop: 0}}"
    assert browser.evaluate("[...document.querySelectorAll('.slider')].filter((one) => !one.hidden).length") == 2
    assert [
        request for request in browser.seen("Network.requestWillBeSent") if "http" in request["request"]["url"][:4]
    ] == []
    for complaint in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
        assert browser.seen(complaint) == []
    browser.screenshot(tmp_path / "replay.png")
    for scheme, width in [("dark", 1280), ("light", 390)]:
        browser.prefer(scheme)
        browser.resize(width, 900)
        browser.wait_for("document.documentElement.scrollWidth <= innerWidth")  # charts follow, a moment later
        browser.screenshot(tmp_path / f"replay-{scheme}.png")
        assert serious_findings(browser) == []
    browser.prefer("light")
    browser.resize(1280, 900)


def test_served_under_its_job(trace: Trace, browser: Browser, tmp_path: Path) -> None:
    """Protects the way there: from the job's page to the sliders, moved by the keyboard, and away as a file."""
    db, job = trace.db, trace.run.job_id
    key = create_key(db, "alice", ["read"])[0]
    with serving(db.url, tmp_path / "uploads") as served:
        browser.open(f"{served.url}/jobs/{job}")
        browser.type_into("#key", key)
        browser.follow("main button")
        browser.follow("#look a")
        assert browser.evaluate("location.pathname") == f"/jobs/{job}/replay"
        browser.wait_for("window.replayed !== undefined")
        before = browser.evaluate("window.replayed")
        browser.evaluate("document.getElementById('exit').focus()")
        for _ in range(200):
            browser.press("ArrowLeft")
        after = browser.evaluate("window.replayed")
        assert after["thresholds"]["exit"] < before["thresholds"]["exit"]
        assert (after["speed"], after["right"]) != (before["speed"], before["right"])
        assert_same(after, replayed(trace, after))
        browser.wait_for("document.querySelectorAll('#replay-chart .point').length > 10")
        assert serious_findings(browser) == []
        foreign = [one["request"]["url"] for one in browser.seen("Network.requestWillBeSent")]
        assert all(url.startswith((served.url, "data:")) for url in foreign)
        for complaint in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
            assert browser.seen(complaint) == []
        saved = served.ask("GET", f"/jobs/{job}/replay?save=file", key)
        table = served.ask("GET", f"/jobs/{job}/replay.csv", key).text
        missing = served.ask("GET", f"/jobs/{job}/replay?benchmark=other", key)
    assert len(table.splitlines()) == 1 + len(
        replay_trace(trace, ReplaySpec(policies=default_policies(trace.pinned))).policies
    )
    assert missing.status_code == 404
    file = tmp_path / "saved.html"
    file.write_text(saved.text)
    browser.open(file)
    browser.wait_for("document.querySelectorAll('#replay-chart .point').length > 10")
    assert_same(slide(browser, "confidence", threshold=0.4), replayed(trace, browser.evaluate("window.replayed")))
    assert json.loads(json.dumps(browser.seen("Log.entryAdded"))) == []
