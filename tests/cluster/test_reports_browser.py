"""The page in a real browser; skipped where none is installed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, find_browser
from invented import HOSTILE, report
from test_reports_views import hostile_report

from cluster.reports.model import JobReport
from cluster.reports.page import write_page

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")

TIP = "document.getElementById('tip')"


@pytest.fixture(scope="module")
def started() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture
def browser(started: Browser) -> Browser:
    started.resize(1280, 900)
    started.prefer("light")
    return started


def show(browser: Browser, found: JobReport, folder: Path) -> None:
    write_page(found, folder / "report.html")
    browser.open(folder / "report.html")
    browser.wait_for("document.querySelectorAll('.chart .main-svg').length > 0")


def assert_quiet(browser: Browser) -> None:
    assert [request["request"]["url"] for request in browser.seen("Network.requestWillBeSent")][1:] == []
    for complaint in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
        assert browser.seen(complaint) == []


def test_charts_are_drawn_without_the_network(browser: Browser, tmp_path: Path) -> None:
    show(browser, report(), tmp_path)
    assert browser.evaluate("document.querySelectorAll('#scatter-0 .point').length") == 3
    assert browser.evaluate("document.querySelectorAll('#layers-0 .point').length") == 6
    assert_quiet(browser)


def test_hostile_text_runs_nothing(browser: Browser, tmp_path: Path) -> None:
    show(browser, hostile_report(), tmp_path)
    assert browser.evaluate("document.images.length + document.scripts.length") == 3
    assert browser.evaluate("document.querySelector('h1').textContent.startsWith('</script><script>')")
    assert browser.evaluate("document.querySelector('#layers-0 .annotation-text').textContent").endswith(HOSTILE)
    assert browser.seen("Page.javascriptDialogOpening") == []
    assert_quiet(browser)


def test_speed_switches_between_token_and_request(browser: Browser, tmp_path: Path) -> None:
    show(browser, report(), tmp_path)
    title = "document.querySelector('#scatter-0 .xtitle').textContent"
    assert browser.evaluate(title) == "Speedup per token"
    browser.evaluate("document.querySelectorAll('.switch input')[1].click()")
    browser.wait_for(f"{title} === 'Speedup per request'")


def test_tokens_are_walked_with_the_keyboard(browser: Browser, tmp_path: Path) -> None:
    show(browser, report(), tmp_path)
    browser.evaluate("document.querySelectorAll('[aria-label^=\"Tokens by confidence\"] .t')[0].focus()")
    browser.evaluate("dispatchEvent(new Event('scroll'))")  # as focus may cause, a moment later
    assert browser.evaluate(f"{TIP}.textContent") == "full depth, layer 30 of 30 · probability 0.875"
    browser.press("ArrowRight")
    assert browser.evaluate(f"{TIP}.textContent") == "exit after layer 24 of 30 · probability 0.875"
    assert browser.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    browser.press("Escape")
    assert browser.evaluate(f"{TIP}.hidden")
    browser.press("Tab")
    assert browser.evaluate("document.activeElement.closest('.tokens').ariaLabel").startswith("Tokens by sec")


def test_charts_follow_the_colour_scheme(browser: Browser, tmp_path: Path) -> None:
    show(browser, report(), tmp_path)
    name = "getComputedStyle(document.querySelector('#layers-0 .annotation-text')).fill"
    light = browser.evaluate(name)
    browser.prefer("dark")
    browser.wait_for(f"{name} !== '{light}'")


def test_charts_keep_their_height_and_take_the_width_of_a_resized_window(browser: Browser, tmp_path: Path) -> None:
    show(browser, report(), tmp_path)
    size = "JSON.stringify([...document.querySelectorAll('.chart')].map((c) => c.querySelector('svg').clientHeight))"
    before = browser.evaluate(size)
    browser.resize(400, 900)
    browser.wait_for("document.querySelector('.chart svg').clientWidth < 400")
    assert browser.evaluate(size) == before
    fits = "(c) => c.querySelector('svg').clientHeight === c.clientHeight"
    assert browser.evaluate(f"[...document.querySelectorAll('.chart')].every({fits})")


def test_nothing_sticks_out_of_a_narrow_window(browser: Browser, tmp_path: Path) -> None:
    browser.resize(360, 800)
    show(browser, hostile_report(), tmp_path)
    browser.evaluate("document.querySelectorAll('details').forEach((fold) => (fold.open = true))")
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
