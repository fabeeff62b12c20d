"""The pages in a real browser; skipped where none is installed."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe import serious_findings
from browser import Browser, find_browser
from invented import HOSTILE
from pages_scene import METRICS, Scene, opened_scene
from small_world import World, shortstop, wait_for

from cluster import jobs as cluster_jobs
from db import jobs
from db.records import JobState

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def scene(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with opened_scene(tmp_path_factory.mktemp("pages"), world) as opened:
        yield opened


@pytest.fixture
def stranger() -> Iterator[Browser]:
    """A browser that nobody has logged in."""
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def started(scene: Scene) -> Iterator[Browser]:
    with Browser() as browser:
        log_in(browser, scene, scene.key)
        yield browser


@pytest.fixture
def browser(started: Browser) -> Browser:
    started.resize(1280, 900)
    started.prefer("light")
    return started


def log_in(browser: Browser, scene: Scene, key: str, then: str = "/") -> None:
    browser.open(scene.served.url + then)
    assert browser.evaluate("location.pathname") == "/login"
    browser.type_into("#key", key)
    browser.follow("main button")
    assert browser.evaluate("location.pathname") == then


def assert_quiet(browser: Browser, scene: Scene) -> None:
    """Nothing was asked of anybody but the server, and nothing was complained of."""
    urls = [request["request"]["url"] for request in browser.seen("Network.requestWillBeSent")]
    foreign = [url for url in urls if not url.startswith((scene.served.url, "data:", "blob:" + scene.served.url))]
    assert urls
    assert foreign == []
    for complaint in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
        assert browser.seen(complaint) == []


def sample_of(scene: Scene, job_id: int) -> int:
    with_samples = scene.served.ask("GET", f"/v1/jobs/{job_id}/completions?limit=1", scene.key).json()
    return int(with_samples["rows"][0]["sample_id"])


def pages_of(scene: Scene) -> list[str]:
    return [
        "/",
        "/submit",
        "/query",
        "/system",
        "/schedules",
        f"/jobs/{scene.done}",
        f"/jobs/{scene.hostile}",
        f"/jobs/{scene.dead}",
        f"/jobs/{scene.waiting}",
        f"/jobs/{scene.done}/completions?kind=differ",
        f"/jobs/{scene.done}/completions/{sample_of(scene, scene.done)}",
        f"/jobs/{scene.hostile}/completions/{sample_of(scene, scene.hostile)}",
        "/compare",
        f"/compare?a={scene.done}&b={scene.other}",
        f"/compare?a={scene.hostile}",
    ]


def test_a_job_from_the_form_to_its_completions(scene: Scene, stranger: Browser, tmp_path: Path) -> None:
    """Log in, submit, watch it finish without touching the page, look, download, log out."""
    browser = stranger
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path), eventsEnabled=True)
    log_in(browser, scene, scene.key, then="/submit")

    spec = scene.world.fields(
        name="from a page", metrics=METRICS, policies=["full", {"confidence": {"threshold": 0.6}}]
    )
    browser.type_into("#spec", json.dumps(spec, indent=1))
    browser.follow("button[value=submit]")
    job_id = int(browser.evaluate("location.pathname.split('/')[2]"))
    assert browser.evaluate("document.querySelector('.state').textContent") == "preparing"
    assert jobs.job(scene.db, job_id).principal == "alice"

    states = "(window.states ??= new Set()).add(document.querySelector('.state').textContent)"
    browser.evaluate(f"setInterval(() => {states}, 20)")  # gone if the page is loaded again
    worker = shortstop("resume", str(job_id), "--inline", "--database", scene.db.url)
    browser.wait_for("document.querySelector('.state').textContent === 'done'")
    worker.communicate()
    assert worker.returncode == 0
    browser.wait_for("document.getElementById('said').textContent === 'The job is done.'")
    browser.wait_for("document.querySelectorAll('#scatter-0 .point').length === 2")
    browser.wait_for("document.querySelectorAll('#depth-0 .scatterlayer .trace').length === 2")
    seen = browser.evaluate("[...window.states]")
    assert seen[0] == "preparing"
    assert "running" in seen
    assert seen[-1] == "done"
    assert_quiet(browser, scene)

    browser.evaluate("document.querySelector('.downloads a[href$=\"report.csv\"]').click()")
    table = wait_for("the table", lambda: next(tmp_path.glob("*report.csv"), None)).read_text()
    assert table.splitlines()[0].startswith("benchmark,policy")
    browser.evaluate("document.querySelector('.downloads a[href*=\"completions?format=csv\"]').click()")
    rows = wait_for("the completions", lambda: next(tmp_path.glob(f"job-{job_id}.csv"), None))
    wait_for("all of them", lambda: rows.read_text().count("jsonl:prompts.jsonl") == 96)

    browser.follow("a[href$=completions]")
    browser.follow(".samples a")
    assert browser.evaluate("document.querySelectorAll('.side').length") == 2
    assert browser.evaluate("document.querySelectorAll('.side .t').length") > 8
    assert_quiet(browser, scene)

    browser.follow("form[action='/logout'] button")
    assert browser.evaluate("location.pathname") == "/login"
    browser.open(f"{scene.served.url}/jobs/{job_id}")
    assert browser.evaluate("location.pathname") == "/login"


def test_the_list_of_jobs_follows_what_happens(scene: Scene, browser: Browser) -> None:
    browser.open(scene.served.url + "/")
    line = f"document.querySelector('[data-job=\"{scene.waiting}\"] .state')?.textContent"
    assert browser.evaluate(line) == "preparing, paused"
    job_id = cluster_jobs.submit(scene.db, scene.world.spec(name="watched"), principal="alice")
    mine = f"document.querySelector('[data-job=\"{job_id}\"] .state')?.textContent"
    browser.wait_for(f"{mine} === 'preparing'")
    jobs.cancel_job(scene.db, job_id)
    browser.wait_for(f"{mine} === 'cancelled'")
    assert_quiet(browser, scene)


#: a stream that takes two seconds to come about
LATE_STREAMS = """
const Real = window.EventSource;
window.EventSource = class {
  constructor(url) {
    setTimeout(() => (this.real = new Real(url)).onmessage = (event) => this.onmessage(event), 2000);
  }
  close() { this.real?.close(); }
};
"""


def test_what_happens_before_a_list_listens_is_shown(scene: Scene, browser: Browser) -> None:
    job_id = cluster_jobs.submit(scene.db, scene.world.spec(name="short"), principal="alice")
    late = browser.call("Page.addScriptToEvaluateOnNewDocument", source=LATE_STREAMS)
    try:
        browser.open(scene.served.url + "/")
    finally:
        browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=late["identifier"])
    mine = f"document.querySelector('[data-job=\"{job_id}\"] .state')?.textContent"
    assert browser.evaluate(mine) == "preparing"
    jobs.cancel_job(scene.db, job_id)
    browser.wait_for(f"{mine} === 'cancelled'")


def test_a_filtered_list_only_says_that_there_is_more(scene: Scene, browser: Browser) -> None:
    browser.open(scene.served.url + "/?search=nightly")
    assert browser.evaluate("document.querySelectorAll('[data-job]').length") == 1
    browser.wait_for("performance.getEntriesByType('resource').some((one) => one.name.includes('/live'))")
    cluster_jobs.submit(scene.db, scene.world.spec(name="another"), principal="alice")
    browser.wait_for("!document.getElementById('news').hidden")
    assert browser.evaluate("document.querySelectorAll('[data-job]').length") == 1


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(scene: Scene, browser: Browser, scheme: str, width: int) -> None:
    browser.prefer(scheme)
    browser.resize(width, 900)
    for page in pages_of(scene):
        browser.open(scene.served.url + page)
        if browser.evaluate("document.getElementById('charts') !== null && document.querySelector('#results section')"):
            browser.wait_for("document.querySelector('#depth-0').dataset.empty !== 'Tokens are being read…'")
        browser.evaluate("document.querySelectorAll('details').forEach((fold) => (fold.open = true))")
        assert serious_findings(browser) == [], page
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), page
        assert_quiet(browser, scene)


def test_axe_finds_nothing_serious_before_the_log_in(scene: Scene, stranger: Browser) -> None:
    stranger.open(scene.served.url + "/login")
    assert serious_findings(stranger) == []
    stranger.type_into("#key", "shortstop_wrong")
    stranger.follow("main button")
    assert "lets nobody in" in stranger.evaluate("document.querySelector('[role=alert]').textContent")
    assert serious_findings(stranger) == []


def test_hostile_text_runs_nothing(scene: Scene, browser: Browser) -> None:
    sample = sample_of(scene, scene.hostile)
    for page in (
        "/",
        "/system",
        f"/jobs/{scene.hostile}",
        f"/jobs/{scene.dead}",
        f"/jobs/{scene.hostile}/completions",
        f"/jobs/{scene.hostile}/completions/{sample}",
        f"/compare?a={scene.hostile}",
        f"/jobs/{scene.hostile}/completions/{sample}?save=file&x=%3Cscript%3Ealert(1)%3C/script%3E",
    ):
        if "save=file" not in page:
            browser.open(scene.served.url + page)
            assert HOSTILE in browser.evaluate("document.body.textContent"), page
            assert browser.evaluate("document.images.length") == 0
            assert browser.evaluate("[...document.scripts].every((one) => one.src || one.id === 'charts')")
            assert browser.seen("Page.javascriptDialogOpening") == []
            assert_quiet(browser, scene)


def test_a_page_as_one_file_needs_nothing_else(scene: Scene, browser: Browser, tmp_path: Path) -> None:
    for place, page in enumerate(pages_of(scene)):
        answer = scene.served.ask("GET", f"{page}{'&' if '?' in page else '?'}save=file", scene.key)
        if page in ("/submit", "/query"):  # nothing to keep but a form
            continue
        file = tmp_path / f"{place}.html"
        file.write_text(answer.text, encoding="utf-8")
        browser.open(file)
        if page == f"/jobs/{scene.done}":
            browser.wait_for("document.querySelectorAll('#scatter-0 .point').length === 4")
            browser.wait_for("document.querySelectorAll('#depth-0 .scatterlayer .trace').length === 4")
        assert browser.evaluate("document.forms.length + document.querySelectorAll('button').length") == 0, page
        assert browser.evaluate("document.querySelector('h1') !== null")
        urls = [request["request"]["url"] for request in browser.seen("Network.requestWillBeSent")]
        assert [url for url in urls if not url.startswith("data:")] == [file.as_uri()]
        for complaint in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
            assert browser.seen(complaint) == []


def test_a_question_is_asked_answered_kept_and_complained_of(scene: Scene, browser: Browser, tmp_path: Path) -> None:
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path), eventsEnabled=True)
    browser.open(scene.served.url + "/query")
    browser.type_into("#sql", "SELECT policy, count(*) AS n FROM token GROUP BY policy ORDER BY policy")
    browser.follow("button[value=show]")
    assert browser.evaluate("document.querySelector('#answer').textContent") == "4 rows"
    assert serious_findings(browser) == []
    browser.evaluate("document.querySelector('[data-download=csv]').click()")
    kept = wait_for("the answer", lambda: next(tmp_path.glob("answer.csv"), None))
    assert kept.read_text().startswith("policy,n\n")
    browser.evaluate("document.querySelector('[value=save]').click()")
    page = wait_for("the page", lambda: next(tmp_path.glob("shortstop-query.html"), None))
    assert "confidence threshold=0.6" in page.read_text()

    browser.evaluate("document.querySelectorAll('[data-insert]')[0].click()")
    assert "job_id" in browser.evaluate("document.getElementById('sql').value")
    assert_quiet(browser, scene)
    browser.type_into("#sql", "DROP TABLE job")
    browser.follow("button[value=show]")
    assert browser.evaluate("document.querySelector('[role=alert]').textContent").startswith("the query")
    assert browser.evaluate("document.getElementById('sql').value") == "DROP TABLE job"


def test_two_jobs_are_compared_from_the_form_to_a_sample(scene: Scene, browser: Browser) -> None:
    browser.open(scene.served.url + "/compare")
    browser.type_into("#a", str(scene.done))
    browser.type_into("#b", f"{scene.other}:full")
    browser.follow(".filters button")
    assert browser.evaluate("document.querySelectorAll('section.benchmark').length") == 4
    browser.type_into("#b", str(scene.other))
    browser.follow(".filters button")
    assert browser.evaluate("document.querySelectorAll('section.benchmark').length") == 2
    browser.wait_for("document.querySelectorAll('#changes-1 .point').length >= 3")
    browser.wait_for("document.querySelectorAll('#parting-1 .bars .point').length >= 1")
    assert browser.evaluate("document.querySelector('#parting-0').textContent") == ""  # full depth wrote the same
    assert "The same tokens for 100.0%" in browser.evaluate("document.querySelectorAll('.headline')[0].textContent")
    assert "where they differ, half do by" in browser.evaluate("document.querySelectorAll('.headline')[1].textContent")
    assert browser.evaluate("document.querySelectorAll('.samples ins, .samples del').length") > 0
    assert_quiet(browser, scene)
    browser.follow("a[aria-label$=' in B']")
    assert browser.evaluate("location.pathname").startswith(f"/jobs/{scene.other}/completions/")


def test_what_cannot_be_compared_is_told_beside_the_form(scene: Scene, browser: Browser) -> None:
    browser.open(f"{scene.served.url}/compare?a={scene.done}&b={scene.dead}")
    told = browser.evaluate("document.querySelector('[role=alert]').textContent")
    assert (
        told == f"job {scene.dead} is {jobs.job(scene.db, scene.dead).state}; only a job that is done can be compared."
    )
    assert browser.evaluate("document.getElementById('a').value") == str(scene.done)
    assert serious_findings(browser) == []


def test_tokens_are_walked_with_the_keyboard(scene: Scene, browser: Browser) -> None:
    browser.open(f"{scene.served.url}/jobs/{scene.done}/completions/{sample_of(scene, scene.done)}")
    browser.evaluate("document.querySelectorAll('.t')[0].focus()")
    tip = "document.getElementById('tip').textContent"
    assert browser.evaluate(tip).startswith("full depth, layer 6 of 6 · probability")
    browser.press("ArrowRight")
    assert "of 6 · probability" in browser.evaluate(tip)
    assert browser.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    browser.press("Escape")
    assert browser.evaluate("document.getElementById('tip').hidden")


def test_a_dead_shard_is_retried_with_one_click(scene: Scene, browser: Browser) -> None:
    browser.open(scene.served.url + "/system")
    assert len(jobs.dead_tasks(scene.db, scene.dead)) == 1
    browser.follow(f"form[action='/jobs/{scene.dead}/retry'] button")
    assert browser.evaluate("location.pathname") == "/system"
    assert jobs.dead_tasks(scene.db, scene.dead) == []
    assert "None: no task has failed" in browser.evaluate("document.querySelector('main').textContent")


def test_a_policy_is_added_on_the_page(scene: Scene, browser: Browser) -> None:
    browser.open(f"{scene.served.url}/jobs/{scene.done}")
    browser.type_into("#policy", "confidence: {threshold: 7}")
    browser.follow(".add button")
    assert "threshold" in browser.evaluate("document.querySelector('.add [role=alert]').textContent")
    browser.type_into("#policy", "confidence: {threshold: 0.9}")
    browser.follow(".add button")
    assert jobs.job(scene.db, scene.done).state is not JobState.DONE
    worker: subprocess.Popen[str] = shortstop("resume", str(scene.done), "--inline", "--database", scene.db.url)
    browser.wait_for("document.querySelector('.state').textContent === 'done'")
    browser.wait_for("document.querySelectorAll('#scatter-0 .point').length === 5")
    worker.communicate()
    assert worker.returncode == 0
