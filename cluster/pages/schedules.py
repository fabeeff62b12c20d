"""Schedules: what recurs, how each firing ended, and what changed between two."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from cluster.api.access import Caller, Reader
from cluster.api.jobs import Shared
from cluster.api.schedules import Name, own
from cluster.api.state import State
from cluster.pages.forms import Changes
from cluster.pages.showing import PageRoute, see_other, show
from cluster.reports.depth import COLOURS, DASHES
from cluster.reports.figures import Figure, axis, layout, line_at
from cluster.schedules.history import Series, changes, series, written
from cluster.schedules.service import ScheduleDetails
from db.incidents import MessageState
from db.keys import Scope
from db.schedules import FiringRow, Verdict

router = APIRouter(include_in_schema=False, route_class=PageRoute)

Verb = Literal["pause", "resume", "trigger", "resend", "remove"]
#: firings of a page
MOST = 60
#: figures that are drawn of a benchmark, where the gate names no others
_DRAWN = ("rouge_l", "speedup_token")
_TITLES = {"rouge_l": "ROUGE-L", "speedup_token": "Speedup per token", "speedup_request": "Speedup per request"}


@dataclass(frozen=True)
class Chart:
    """One figure of one benchmark, a line a policy."""

    name: str  #: in the page
    title: str
    benchmark: str
    policies: list[tuple[str, str]]  #: mark and label


@router.get("/schedules")
def list_schedules(request: Request, caller: Reader, state: Shared) -> Response:
    """The schedules by name."""
    found = state.service(caller.name).schedules.list()
    return show(request, caller, "schedules.html.j2", scripts=("live.js", "system.js"), found=found, word=word)


@router.get("/schedules/{name}")
def show_schedule(request: Request, name: Name, caller: Reader, state: Shared) -> Response:
    """One schedule with its history."""
    details = state.service(caller.name).schedules.show(name, limit=MOST)
    drawn, figures = _charts(details)
    return show(
        request,
        caller,
        "schedule.html.j2",
        scripts=("live.js", "system.js"),
        charts=figures,
        schedule=details.schedule,
        spec=details.schedule.spec,
        incident=details.incident,
        firings=details.firings,
        messages=details.messages,
        drawn=drawn,
        verbs=_verbs(details, caller),
        word=word,
        changes=changes,
        written=written,
        most=MOST,
    )


def word(one: FiringRow) -> tuple[str, str]:
    """What came of a firing: the word, and the style that it is shown in."""
    if one.verdict is not None:
        style = {Verdict.PASS: "done", Verdict.FAIL: "failed", Verdict.INCONCLUSIVE: "waiting"}[one.verdict]
        return one.verdict.value, style
    if one.state == "submitted":
        return ("under way" if len(one.jobs) < 2 else "being confirmed"), "running"
    return one.state.value, "cancelled"


def _verbs(details: ScheduleDetails, caller: Caller) -> list[Verb]:
    """Those that have a sense now, of a caller who owns the schedule or looks after all."""
    row = details.schedule
    if not caller.may(Scope.SUBMIT) or (row.principal != caller.name and not caller.may(Scope.ADMIN)):
        return []
    verbs: list[Verb] = ["trigger", "resume" if row.paused else "pause"]
    if any(one.state is not MessageState.DELIVERED for one in details.messages):
        verbs.append("resend")
    return [*verbs, "remove"]


@router.post("/schedules/{name}/{verb}")
def change(name: Name, verb: Annotated[Verb, Path()], posted: Changes, state: Shared) -> Response:
    """Trigger, pause, resume or remove a schedule, or send its messages again."""
    return _changed(name, verb, posted.caller, state)


def _changed(name: str, verb: Verb, caller: Caller, state: State) -> Response:
    mine: Any = own(state, caller, name)
    getattr(mine, verb)(name)
    return see_other("/schedules" if verb == "remove" else f"/schedules/{name}")


# --- charts --------------------------------------------------------------------------------------------------


def _charts(details: ScheduleDetails) -> tuple[list[Chart], dict[str, Figure]]:
    gate = details.schedule.spec.get("gate") or {}
    wanted = [rule["metric"] for rule in gate.get("rules", [])]
    found = series(details.firings)
    drawn: list[Chart] = []
    figures: dict[str, Figure] = {}
    for benchmark in dict.fromkeys(one.benchmark for one in found):
        marks = {policy: chr(ord("A") + place % 26) for place, policy in enumerate(_policies(found, benchmark))}
        for metric in dict.fromkeys([*wanted, *_DRAWN]):
            lines = [one for one in found if (one.benchmark, one.metric) == (benchmark, metric)]
            if not lines:
                continue
            name = f"history-{len(drawn)}"
            policies = [(marks[one.policy], one.policy) for one in lines]
            drawn.append(Chart(name, _TITLES.get(metric, metric), benchmark, policies))
            figures[name] = _figure(lines, metric, marks)
    return drawn, figures


def _policies(found: list[Series], benchmark: str) -> list[str]:
    return list(dict.fromkeys(one.policy for one in found if one.benchmark == benchmark))


def _figure(lines: list[Series], metric: str, marks: dict[str, str]) -> Figure:
    begun = sorted({_day(point.at) for one in lines for point in one.points if point.begins_line})
    return {
        "data": [_line(one, metric, marks[one.policy], list(marks).index(one.policy)) for one in lines],
        "layout": layout(height=300)
        | {
            "margin": {"l": 52, "r": 28, "t": 12, "b": 48},
            "hovermode": "closest",
            "showlegend": False,
            "xaxis": axis("Firing, UTC") | {"type": "date", "nticks": 7},
            "yaxis": axis(_TITLES.get(metric, metric)) | {"nticks": 6},
            "shapes": [line_at("x", day) for day in begun],
        },
    }


def _line(one: Series, metric: str, mark: str, place: int) -> Figure:
    colour = f"var(--series-{place % COLOURS})"
    failed = [point.verdict == "fail" for point in one.points]
    last = len(one.points) - 1
    return {
        "type": "scatter",
        "mode": "lines+markers+text",
        "name": mark,
        "x": [_day(point.at) for point in one.points],
        "y": [point.value for point in one.points],
        "text": [mark if at == last else "" for at in range(last + 1)],
        "textposition": "middle right",
        "textfont": {"size": 12, "color": colour, "weight": 700},
        "line": {"color": colour, "width": 2, "dash": DASHES[place % len(DASHES)]},
        "marker": {
            "color": ["var(--danger)" if is_fail else colour for is_fail in failed],
            "size": [12 if is_fail else 6 for is_fail in failed],
            "symbol": ["x" if is_fail else "circle" for is_fail in failed],
        },
        "hovertext": [
            f"{mark} · {_day(point.at)} · job {point.job_id}: {written(metric, point.value)} · {point.verdict}"
            for point in one.points
        ],
        "hoverinfo": "text",
        "cliponaxis": False,
    }


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")
