"""What a firing is held against: along its line, by the schedule's rule."""

from dataclasses import replace
from typing import Any

import pytest

from cluster.schedules import lines
from cluster.schedules.lines import RunFigures, as_figures, changed, held_against
from cluster.schedules.spec import parse_schedule
from db import firings, jobs, schedules
from db.schedules import FiringRow, ScheduleRow, Verdict, Wish
from db.session import Database
from db.tables import job as job_table

JOB = {"model": "smollm2-135m", "benchmarks": ["humaneval-lines"], "policies": ["full"]}
LINE = {"benchmark": "b1", "device class": "cpu", "exits": "e1", "metric es": "es@1"}
PASS, FAIL, INCONCLUSIVE = Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE


class History:
    """A schedule whose firings are made up."""

    def __init__(self, db: Database, baseline: Any = "last-passed") -> None:
        self.db, self.at = db, 0.0
        gate = {"rules": [{"metric": "es", "max_loss": 0.02}]}
        fields = {"name": "x", "cron": "0 2 * * *", "job": JOB, "gate": gate, "baseline": baseline}
        self.spec = parse_schedule(fields)
        self.row: ScheduleRow = schedules.add(
            db, "x", self.spec.dump(), overlap="allow", next_at=None, principal="a", at=0.0
        )

    def night(self, verdict: Verdict | None, es: float | None = 0.5, **line: Any) -> int:
        """A firing whose job is done. Returns its job."""
        one, run = self.next(es, **line)
        with self.db.write() as connection:
            connection.execute(job_table.update().where(job_table.c.id == one.jobs["run"]).values(state="done"))
        figures = as_figures([run]) if verdict is not None else []
        assert firings.settle(self.db, self.row, one, verdict or FAIL, "x", at=self.at, figures=figures)
        return one.jobs["run"]

    def next(self, es: float | None = 0.5, policy: str = "full", **line: Any) -> tuple[FiringRow, RunFigures]:
        self.at += 1.0
        one = firings.trigger(self.db, self.row, Wish("x", {}), self.at)
        changes = {name.replace("_", " "): value for name, value in line.items()}
        figures = {} if es is None else {"es": {"value": es, "low": None, "high": None}}
        return one, RunFigures(one.jobs["run"] * 100, "lines", policy, LINE | changes, figures)

    def held(self, **options: Any) -> tuple[int | None, str]:
        """The baseline's job of the next firing, or why there is none."""
        one, run = self.next(**options)
        [found] = held_against(self.db, self.row, self.spec, one, [run])
        assert found.run_id == run.run_id
        assert found.baseline == (None if found.job_id is None else found.job_id * 100)
        return found.job_id, found.reason


def test_the_last_that_passed(db: Database) -> None:
    history = History(db)
    assert history.held() == (None, "nothing was before it")
    first = history.night(INCONCLUSIVE)
    assert history.held() == (first, "")  # none has passed yet: the one that began the line
    history.night(FAIL)
    assert history.held() == (first, "")
    passed = history.night(PASS)
    history.night(INCONCLUSIVE)
    history.night(FAIL)
    assert history.held() == (passed, "")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"benchmark": "b2"}, "benchmark"),
        ({"exits": "e2"}, "exits"),
        ({"metric_es": "es@2"}, "metric es"),
        ({"device_class": "cuda"}, "device class"),
        ({"benchmark": "b2", "exits": "e2"}, "benchmark, exits"),
    ],
)
def test_another_yardstick_begins_a_new_line(db: Database, change: dict[str, Any], what: str) -> None:
    """And the old line goes on where the yardstick comes back."""
    history = History(db)
    old = history.night(PASS)
    assert history.held(**change) == (None, f"its {what} changed")
    began = history.night(INCONCLUSIVE, **change)
    assert history.held(**change) == (began, "")
    assert history.held() == (old, "")
    assert history.held(policy="other") == (None, "nothing was before it")


def test_the_median_of_the_last_n(db: Database) -> None:
    """By the gate's first metric; failures are left out, or a loss that stays would become the norm."""
    history = History(db, {"median": 3})
    history.night(INCONCLUSIVE, 0.9)
    low, high = history.night(PASS, 0.5), history.night(PASS, 0.7)
    middle = history.night(PASS, 0.6)
    for _ in range(3):
        history.night(FAIL, 0.1)
    assert history.held() == (middle, "")
    history.night(PASS, 0.8)
    assert history.held() == (high, "")
    assert low not in {history.held()[0]}


def gone(db: Database, *job_ids: int) -> None:
    with db.write() as connection:
        connection.execute(job_table.update().where(job_table.c.id.in_(job_ids)).values(state="cancelled"))


def test_where_the_jobs_were_pruned(db: Database) -> None:
    history = History(db)
    gone(db, history.night(PASS))
    assert history.held() == (None, "the jobs before it were pruned")
    began = history.night(INCONCLUSIVE)  # and says so: the line begins anew with it
    assert history.held() == (began, "")


@pytest.mark.parametrize("baseline", ["last-passed", {"median": 2}])
def test_a_failure_becomes_nobodys_baseline_however_long_it_lasts(
    db: Database, baseline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More firings than are read at once: else what failed would pass one day, and its incident be closed."""
    monkeypatch.setattr(lines, "LOOKED_AT", 3)
    history = History(db, baseline)
    passed = history.night(PASS)
    for _ in range(8):
        history.night(FAIL, 0.1)
    assert history.held() == (passed, "")
    gone(db, passed)
    assert history.held() == (None, "the jobs before it were pruned")


def test_the_last_that_passed_is_found_behind_many_that_say_nothing(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "LOOKED_AT", 3)
    history = History(db)
    passed = history.night(PASS)
    for verdict in (INCONCLUSIVE, FAIL) * 6:
        history.night(verdict)
    assert history.held() == (passed, "")


def test_a_line_that_failed_from_its_beginning_has_that(db: Database) -> None:
    history = History(db)
    began = history.night(FAIL)
    history.night(FAIL)
    assert history.held() == (began, "")


def test_a_firing_that_left_no_figures_is_nobodys_baseline(db: Database) -> None:
    history = History(db)
    history.night(None)
    assert history.held() == (None, "nothing was before it")


def test_a_pinned_job_that_lacks_the_run(db: Database) -> None:
    job_id = jobs.create_job(db, name="x", spec={})
    history = History(db, {"job": job_id})
    assert history.held() == (None, f"job {job_id} has no full on lines")


def test_exits_that_are_asked_for_as_latest_stay_on_their_line(db: Database) -> None:
    from cluster.schedules.lines import _line

    pinned = {"benchmarks": {"lines": "b1"}, "device_class": "cpu", "metrics": {"es": "es@1", "em": "em@1"}}
    history = History(db)
    named = history.spec.model_copy(update={"job": history.spec.job.model_copy(update={"exits": "/exits/one"})})
    latest = history.spec.model_copy(update={"job": history.spec.job.model_copy(update={"exits": "/exits/latest"})})
    for spec, is_same in ((named, False), (latest, True)):
        one, other = (_line(spec, pinned | {"exits_hash": hash}, "lines") for hash in ("e1", "e2"))
        assert (one == other) is is_same
        assert one["metric es"] == "es@1"
        assert "metric em" not in one  # the gate does not ask for it


def test_a_line_is_told_by_what_a_job_pins(db: Database) -> None:
    """Its samples, its device class, its exits, the versions of the gate's metrics; nothing else of it."""
    history = History(db)
    pinned = {"benchmarks": {"lines": "b1"}, "device_class": "cpu", "metrics": {"es": "es@1"}, "exits_hash": "e1"}
    line = lines._line(history.spec, pinned, "lines")
    assert line == LINE
    for change in ({"benchmarks": {"lines": "b2"}}, {"device_class": "gpu"}, {"metrics": {"es": "es@2"}}):
        assert lines._line(history.spec, pinned | change, "lines") != line
    assert lines._line(history.spec, pinned | {"weights_hash": "w2", "git_revision": "r2"}, "lines") == line


def test_what_changed() -> None:
    before, after = {"model": "a", "exits": "x", "torch": 1}, {"model": "b", "torch": 1, "device": "gpu"}
    assert changed(before, after) == [
        {"what": "model", "before": "a", "after": "b"},
        {"what": "device", "before": None, "after": "gpu"},
        {"what": "exits", "before": "x", "after": None},
    ]
    assert changed(after, after) == []
    run = RunFigures(1, "lines", "full", LINE)
    assert as_figures([replace(run, run_id=2)])[0]["run_id"] == 2
