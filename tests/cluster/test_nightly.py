"""A nightly from end to end: it fires, its job runs, worse exits fail the gate, that is confirmed, people are told.

Everything is real but the nights: the moment at which the schedule fires next is set to now. The server looks, judges
and tells; a worker without Ray does the jobs; the receiver of the webhook and the browser are on this machine.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from axe import serious_findings
from browser import Browser, find_browser
from invented import HOSTILE
from receiver import Receiver, receiving
from served import Served, serving
from small_world import World, wait_for, write_prompts

from cluster import jobs as cluster_jobs
from cluster.client import Client
from db import firings, incidents, jobs, listing, results, schedules
from db.incidents import MessageState
from db.keys import create_key
from db.schedule_tables import schedule
from db.schedules import FiringRow, Verdict
from db.session import Database, open_database

NAME = "nightly"
PROMPTS, DRAWN = 120, 60


@dataclass
class Nightly:
    """A schedule of a server, and all around it."""

    db: Database
    served: Served
    receiver: Receiver
    exits: Path  #: the folder in which `latest` is looked up
    world: World
    key: str
    secret: str

    def night(self) -> FiringRow:
        """Let it fire, see its jobs done, and come back when it is judged."""
        row = schedules.find(self.db, NAME)
        before = len(firings.firings(self.db, row.id))
        with self.db.write() as connection:
            connection.execute(schedule.update().where(schedule.c.id == row.id).values(next_at=float(int(time.time()))))
        wait_for("the firing", lambda: len(firings.firings(self.db, row.id)) > before)
        return wait_for("the verdict", self._judged)

    def _judged(self) -> FiringRow | None:
        for job in listing.summaries(self.db):
            if not job.state.ended:
                cluster_jobs.work(self.db, job.id, inline=True)
        newest = firings.firings(self.db, schedules.find(self.db, NAME).id, limit=1)[0]
        return newest if newest.settled_at is not None else None

    def publish(self, name: str, *, confident: bool) -> Path:
        """Exits whose heads know nothing: those that are sure of themselves leave at once with any token."""
        import torch
        from tiny_models import POINTS, facts_of, write_bundle

        facts = facts_of(self.world.model)
        torch.manual_seed(1)
        size = 30.0 if confident else 1e-3
        heads = {
            f"heads.{point}.weight": torch.randn(facts.vocab_size, facts.hidden_size) * size
            for point in POINTS
            if point < facts.n_layers
        }
        options: dict[str, Any] = {"head": "untied", "exit_points": POINTS, "shortlist": None, "controller": False}
        return write_bundle(self.exits / name, facts, heads, **options)


@pytest.fixture(scope="module")
def nightly(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nightly]:
    folder = tmp_path_factory.mktemp("nightly")
    url = f"sqlite:///{folder / 'record.db'}"
    with closing(open_database(url)) as db, receiving() as receiver:
        key = create_key(db, "alice", ["read", "submit"])[0]
        answered = answered_prompts(db, world, folder)
        exits = folder / "exits"
        exits.mkdir()
        settings = {"webhook_allow": "127.0.0.0/8"}
        with serving(
            url, folder / "uploads", "--allow", str(folder), "--allow", str(world.folder), **settings
        ) as served:
            made = Nightly(db, served, receiver, exits, world, key, "")
            made.publish("2026-01-01", confident=False)
            made.secret = add_schedule(made, answered)
            yield made


def answered_prompts(db: Database, world: World, folder: Path) -> Path:
    """Prompts whose reference is what the model writes at full depth: every other token is a loss."""
    prompts = write_prompts(folder / "prompts.jsonl", PROMPTS)
    source = {"jsonl": str(prompts), "id": "id", "group": "file", "ends": "text"}
    job_id = cluster_jobs.submit(db, world.spec(policies=["full"], benchmarks=[source]))
    assert cluster_jobs.work(db, job_id, inline=True) is cluster_jobs.JobState.DONE
    texts = {row.sample.name: row.outcome.text for row in results.completions(db, job_id=job_id)}
    lines = [json.loads(line) for line in prompts.read_text().splitlines()]
    file = folder / "answered.jsonl"
    file.write_text("".join(json.dumps(line | {"reference": texts[line["id"]]}) + "\n" for line in lines))
    return file


def add_schedule(nightly: Nightly, prompts: Path) -> str:
    source = {"jsonl": str(prompts), "id": "id", "group": "file", "ends": "text", "samples": DRAWN}
    job = nightly.world.fields(
        name=HOSTILE,
        exits=str(nightly.exits / "latest"),
        benchmarks=[source],
        policies=["full", {"confidence": {"threshold": 0.9}}],
        metrics=["es", "accepted"],
    )
    gate = {"rules": [{"metric": "es", "max_loss": 0.05}]}
    spec: Any = {"name": NAME, "cron": "0 2 1 1 *", "job": job, "gate": gate, "webhooks": [nightly.receiver.url]}
    with Client(nightly.served.url, nightly.key) as client:
        return client.schedules.add(spec).secrets[nightly.receiver.url]


@pytest.fixture(scope="module")
def nights(nightly: Nightly) -> list[FiringRow]:
    """Good exits twice, worse ones twice, and good ones again."""
    found = [nightly.night(), nightly.night()]
    nightly.publish("2026-01-02", confident=True)
    found += [nightly.night(), nightly.night()]
    shutil.rmtree(nightly.exits / "2026-01-02")
    nightly.publish("2026-01-03", confident=False)
    return [*found, nightly.night()]


@pytest.mark.timeout(600)
def test_verdicts_and_why(nightly: Nightly, nights: list[FiringRow]) -> None:
    first, second, worse, again, good = nights
    assert (first.verdict, second.verdict) == (Verdict.INCONCLUSIVE, Verdict.PASS)
    assert "nothing was before it" in str(first.sentence)
    assert worse.verdict is again.verdict is Verdict.FAIL
    assert str(worse.sentence).startswith("es of confidence threshold=0.9 on ")
    assert "It shows again on fresh samples." in str(worse.sentence)
    assert good.verdict is Verdict.PASS


@pytest.mark.timeout(600)
def test_a_failure_is_confirmed_on_samples_that_were_not_used(nightly: Nightly, nights: list[FiringRow]) -> None:
    worse = nights[2]
    assert set(worse.jobs) == {"run", "fresh samples", "baseline on fresh samples"}
    own, fresh, before = (worse.jobs[role] for role in ("run", "fresh samples", "baseline on fresh samples"))
    used = {row.sample.name for row in results.completions(nightly.db, job_id=own)}
    drawn = {row.sample.name for row in results.completions(nightly.db, job_id=fresh)}
    assert len(used) == len(drawn) == DRAWN
    assert len(drawn - used) >= 6
    # what failed is held against what passed, both done anew
    pinned = {job_id: jobs.job(nightly.db, job_id).pinned for job_id in (own, fresh, before)}
    assert pinned[fresh]["exits_hash"] == pinned[own]["exits_hash"] != pinned[before]["exits_hash"]
    passed = jobs.job(nightly.db, nights[1].jobs["run"]).pinned
    assert pinned[before]["exits_hash"] == passed["exits_hash"]


@pytest.mark.timeout(600)
def test_what_latest_was_and_what_changed(nightly: Nightly, nights: list[FiringRow]) -> None:
    """The line goes on when the exits under `latest` change, for they are what is measured."""
    first, second, worse, again, good = nights
    assert first.resolved == {"exits": str(nightly.exits / "2026-01-01")}
    assert worse.resolved == {"exits": str(nightly.exits / "2026-01-02")}
    assert [change["what"] for change in worse.changed] == ["exits", "exits_hash"]
    assert first.changed == second.changed == again.changed == []
    assert {change["what"] for change in good.changed} == {"exits", "exits_hash"}
    [_, policy] = worse.figures
    assert policy["figures"]["es"]["value"] < 0.9 < second.figures[1]["figures"]["es"]["value"]


@pytest.mark.timeout(600)
def test_the_receiver_hears_of_the_incident_twice(nightly: Nightly, nights: list[FiringRow]) -> None:
    """When it opens and when it closes; not of the night between, nor of the one that was inconclusive."""
    receiver = nightly.receiver
    wait_for("the message", lambda: len(receiver.received) == 2)
    assert receiver.kinds == ["incident.opened", "incident.closed"]
    opened, closed = receiver.received
    assert all(one.is_signed_with(nightly.secret) for one in receiver.received)
    assert opened.event["data"]["jobs"] == nights[2].jobs
    assert opened.event["data"]["sentence"] == nights[2].sentence
    assert opened.event["data"]["latest"] == nights[2].resolved
    assert closed.event["data"]["failed_firings"] == 2
    row = schedules.find(nightly.db, NAME)
    assert {one.state for one in incidents.messages(nightly.db, row.id)} == {MessageState.DELIVERED}
    assert incidents.open_incidents(nightly.db) == {}


@pytest.fixture(scope="module")
def browser(nightly: Nightly, nights: list[FiringRow]) -> Iterator[Browser]:
    if find_browser() is None:
        pytest.skip("no Chromium is installed")
    with Browser() as started:
        started.open(nightly.served.url + "/login")
        started.type_into("#key", nightly.key)
        started.follow("main button")
        yield started


@pytest.mark.timeout(600)
def test_the_page_shows_it(nightly: Nightly, nights: list[FiringRow], browser: Browser, tmp_path: Path) -> None:
    browser.open(f"{nightly.served.url}/schedules")
    browser.screenshot(tmp_path / "schedules.png")
    browser.follow(f"a[href='/schedules/{NAME}']")
    browser.wait_for("document.querySelectorAll('#history-0 .scatterlayer .trace').length === 2")
    words = browser.evaluate(
        "[...document.querySelectorAll('#history table:first-of-type .state')].map((one) => one.textContent)"
    )
    assert words[:5] == ["pass", "fail", "fail", "pass", "inconclusive"]
    text = browser.evaluate("document.querySelector('main').textContent")
    assert str(nights[2].sentence) in text
    assert f"latest exits: {nights[2].resolved['exits']}" in text
    assert f"fresh samples: job {nights[2].jobs['fresh samples']}" in text
    assert "incident.opened" in text
    assert browser.evaluate("document.images.length") == 0
    browser.screenshot(tmp_path / "schedule.png")
    before, own = nights[1].jobs["run"], nights[2].jobs["run"]
    assert browser.evaluate(f"document.querySelectorAll(\"a[href='/compare?a={before}&b={own}']\").length") == 1
    browser.follow(f"a[href='/jobs/{own}']")
    assert HOSTILE in browser.evaluate("document.querySelector('h1').textContent")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(nightly: Nightly, browser: Browser, scheme: str, width: int, tmp_path: Path) -> None:
    browser.prefer(scheme)
    browser.resize(width, 900)
    for page in ("/schedules", f"/schedules/{NAME}"):
        browser.open(nightly.served.url + page)
        browser.screenshot(tmp_path / f"{page.rsplit('/', 1)[1]}.png")
        assert serious_findings(browser) == [], page
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), page
        for complaint in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
            assert browser.seen(complaint) == []
    browser.prefer("light")
    browser.resize(1280, 900)


@pytest.mark.timeout(600)
def test_buttons_of_the_page(nightly: Nightly, browser: Browser) -> None:
    browser.open(f"{nightly.served.url}/schedules/{NAME}")
    browser.follow("form[action$='/pause'] button")
    assert schedules.find(nightly.db, NAME).paused
    assert browser.evaluate("location.pathname") == f"/schedules/{NAME}"
    assert "Paused." in browser.evaluate("document.querySelector('.standing').textContent")
    browser.follow("form[action$='/resume'] button")
    assert not schedules.find(nightly.db, NAME).paused
    browser.follow("form[action$='/trigger'] button")
    [newest] = firings.firings(nightly.db, schedules.find(nightly.db, NAME).id, limit=1)
    assert newest.cause == "trigger"
    browser.follow("form[action$='/trigger'] button")
    assert "has not ended" in browser.evaluate("document.querySelector('main').textContent")
    jobs.cancel_job(nightly.db, newest.jobs["run"])
