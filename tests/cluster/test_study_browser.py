"""The page of a study in a real browser: its pictures are drawn, from the file alone, and can be read by everybody."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from axe import serious_findings
from browser import Browser, find_browser
from small_world import World

from cluster import jobs
from cluster.reports.study_page import write_study_page
from cluster.settings import Settings
from cluster.spec import parse_job
from cluster.study.report import Study, study
from cluster.traced import trace_of
from db.records import JobState
from db.session import open_database

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def studied(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    fields = {name: value for name, value in world.fields(trace="reference").items() if name != "policies"}
    with closing(open_database(f"sqlite:///{tmp_path_factory.mktemp('study') / 'record.db'}")) as db:
        job_id = jobs.submit(db, parse_job(fields))
        assert jobs.work(db, job_id, inline=True) is JobState.DONE
        yield study(trace_of(db, job_id), Settings(), continue_samples=12, inline=True)


def test_the_pictures_are_drawn(studied: Study, tmp_path: Path) -> None:
    """Protects the page: four charts a benchmark, their numbers those of the study, no scroll bar on a telephone."""
    page = tmp_path / "study.html"
    write_study_page([studied], page)
    with Browser() as browser:
        browser.open(page)
        browser.wait_for("document.querySelectorAll('.chart .main-svg').length > 3")
        drawn = browser.evaluate("document.getElementById('chart-depth-0').data[0].y")
        assert drawn[:-1] == pytest.approx([one.value for one in studied.counted.overall.first_right])
        assert browser.evaluate("document.getElementById('chart-agreement-0').data[0].z[0][0]") == 1
        headline = browser.evaluate("document.querySelector('.headline').textContent")
        assert f"{100 * studied.counted.overall.never.value:.1f}%" in headline
        assert browser.evaluate("document.querySelectorAll('table').length") == 2
        requests = [one["request"]["url"] for one in browser.seen("Network.requestWillBeSent")]
        assert [url for url in requests if url.startswith("http")] == []
        for complaint in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
            assert browser.seen(complaint) == []
        assert serious_findings(browser) == []
        for scheme, width in [("dark", 1280), ("light", 390)]:
            browser.prefer(scheme)
            browser.resize(width, 900)
            browser.wait_for("document.documentElement.scrollWidth <= innerWidth")  # charts follow, a moment later
            assert serious_findings(browser) == []
