"""The page of a study: its pictures and numbers as one HTML file that needs nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import PackageLoader
from markupsafe import Markup

from cluster.reports import formats as f
from cluster.reports.figures import Figure, axis, layout
from cluster.reports.page import asset, content_security_policy, environment, json_block, plotly, ramp
from cluster.study.continued import judged_by, named
from cluster.study.counting import Counted, Share, Slice
from cluster.study.report import Study
from engine.errors import BadInput

_SCRIPTS = ("plotly", "page.js")
_PERCENT: Figure = {"tickformat": ".0%", "rangemode": "tozero"}
_LEGEND: Figure = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "font": {"size": 11}}
#: pixels of a row of the stacked bars
_ROW = 34


def write_study_page(studies: Sequence[Study], path: Path) -> None:
    """Write the page. Raises `BadInput` where it cannot be written."""
    scripts = [plotly() if name == "plotly" else asset(name) for name in _SCRIPTS]
    points = sorted({point for one in studies for point in one.counted.points})
    page = (
        environment(PackageLoader("cluster.reports"))
        .get_template("study.html.j2")
        .render(
            studies=studies,
            facts=_facts,
            rows=_rows,
            share=_share,
            continued=_continued,
            charts=Markup(json_block(_charts(studies))),
            ramp=ramp(points),
            styles=[Markup(asset(name)) for name in ("page.css", "study.css")],
            scripts=[Markup(script) for script in scripts],
            policy=content_security_policy(scripts),
        )
    )
    try:
        path.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise BadInput(f"html: {str(path)!r} cannot be written ({error.strerror}); name another file.") from None


def _charts(studies: Sequence[Study]) -> dict[str, Figure]:
    found: dict[str, Figure] = {}
    for number, one in enumerate(studies):
        counted = one.counted
        found[f"depth-{number}"] = _by_depth(counted)
        found[f"agreement-{number}"] = _matrix(counted)
        found[f"kinds-{number}"] = _stacked(counted, [*counted.kinds, *counted.languages])
        found[f"positions-{number}"] = _by_position(counted)
    return found


def _by_depth(counted: Counted) -> Figure:
    """First right and right at each exit point, and the share that never is."""
    names = _names(counted)
    first = {
        "type": "bar",
        "name": "first right here",
        "x": [*names, "never"],
        "y": [*(one.value for one in counted.overall.first_right), None],
        "error_y": _bars([*counted.overall.first_right, None]),
        "marker": {"color": [*(f"var(--layer-{point})" for point in counted.points), "var(--stop)"]},
        "hovertemplate": "%{y:.1%} of tokens are first right at %{x}<extra></extra>",
        "showlegend": False,
    }
    never = {
        "type": "bar",
        "name": "wrong at every exit point",
        "x": [*names, "never"],
        "y": [*(None for _ in names), counted.overall.never.value],
        "error_y": _bars([*(None for _ in names), counted.overall.never]),
        "marker": {"color": "var(--stop)"},
        "hovertemplate": "%{y:.1%} of tokens are wrong at every exit point<extra></extra>",
        "showlegend": False,
    }
    right = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "right at this exit point",
        "x": names,
        "y": [one.value for one in counted.overall.right],
        "error_y": _bars(counted.overall.right),
        "line": {"color": "var(--ink)", "width": 2},
        "hovertemplate": "%{y:.1%} are right at %{x}<extra></extra>",
        "showlegend": False,
    }
    return {
        "data": [first, never, right],
        "layout": _layout(380)
        | {"barmode": "overlay", "xaxis": axis("Exit after layer") | {"type": "category"}, "yaxis": _share_axis()},
    }


def _matrix(counted: Counted) -> Figure:
    names = _names(counted)
    cells = [[f"{100 * value:.0f}" for value in row] for row in counted.agreement]
    heat = {
        "type": "heatmap",
        "x": names,
        "y": names,
        "z": counted.agreement,
        "zmin": 0,
        "zmax": 1,
        "text": cells,
        "texttemplate": "%{text}",
        "colorscale": [[0, "#f1f4f9"], [1, "#3f78c9"]],
        "textfont": {"color": "#1b1f24"},
        "showscale": False,
        "hovertemplate": "%{x} and %{y} choose the same token for %{z:.1%}<extra></extra>",
    }
    return {
        "data": [heat],
        "layout": _layout(380)
        | {
            "xaxis": axis("Exit after layer") | {"type": "category"},
            "yaxis": axis("Exit after layer") | {"type": "category", "autorange": "reversed"},
        },
    }


def _stacked(counted: Counted, slices: Sequence[Slice]) -> Figure:
    """For each kind and language, which point is the first to be right."""
    shown = [*slices][::-1]
    names = [f.visible(one.name) for one in shown]

    def bar(name: str, values: list[float], colour: str) -> Figure:
        return {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": names,
            "x": values,
            "marker": {"color": colour},
            "customdata": [f"{one.tokens:,}" for one in shown],
            "hovertemplate": f"%{{x:.1%}} of %{{customdata}} tokens of %{{y}}: {name}<extra></extra>",
        }

    bars = [
        bar(name, [one.first_right[place].value for one in shown], f"var(--layer-{point})")
        for place, (point, name) in enumerate(zip(counted.points, _names(counted), strict=True))
    ]
    never = bar("never", [one.never.value for one in shown], "var(--stop)")
    return {
        "data": [*bars, never],
        "layout": _layout(120 + _ROW * len(shown))
        | {
            "barmode": "stack",
            "legend": {
                "orientation": "h",
                "traceorder": "normal",
                "y": 1.02,
                "yanchor": "bottom",
                "font": {"size": 11},
            },
            "xaxis": _share_axis("Share of tokens first right after") | {"range": [0, 1]},
            "yaxis": axis("") | {"type": "category", "automargin": True, "tickfont": {"size": 12}},
        },
    }


def _by_position(counted: Counted) -> Figure:
    names = [one.name for one in counted.positions]

    def line(name: str, shares: list[Share], colour: str) -> Figure:
        return {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": names,
            "y": [one.value for one in shares],
            "error_y": _bars(shares),
            "line": {"color": colour, "width": 2},
            "hovertemplate": f"{name}: %{{y:.1%}} at position %{{x}}<extra></extra>",
        }

    first = counted.points[0]
    return {
        "data": [
            line("right at full depth", [one.right[-1] for one in counted.positions], "var(--ink)"),
            line(f"right after layer {first}", [one.right[0] for one in counted.positions], f"var(--layer-{first})"),
            line("wrong at every exit point", [one.never for one in counted.positions], "var(--stop)"),
        ],
        "layout": _layout(380)
        | {
            "legend": _LEGEND,
            "xaxis": axis("Position in the target") | {"type": "category"},
            "yaxis": _share_axis(),
        },
    }


def _layout(height: int) -> Figure:
    return layout(height=height) | {"margin": {"l": 60, "r": 12, "t": 12, "b": 52}, "hovermode": "closest"}


def _share_axis(title: str = "Share of tokens") -> Figure:
    return axis(title) | _PERCENT


def _bars(shares: Sequence[Share | None]) -> Figure:
    """95 % intervals."""

    def to(end: str) -> list[float]:
        return [
            0.0 if one is None or one.low is None or one.high is None else abs(getattr(one, end) - one.value)
            for one in shares
        ]

    return {
        "type": "data",
        "symmetric": False,
        "array": to("high"),
        "arrayminus": to("low"),
        "thickness": 1,
        "width": 3,
        "color": "var(--muted)",
    }


def _names(counted: Counted) -> list[str]:
    return [*map(str, counted.points[:-1]), "full depth"]


def _facts(one: Study) -> list[tuple[str, str]]:
    counted = one.counted
    return [
        ("Trace", f"job {one.job_id}, target {one.target}"),
        ("Model", f"{one.model}, {one.n_layers} layers"),
        ("Exits", f"{one.exits or '–'}, after layers {', '.join(map(str, counted.points[:-1]))}"),
        ("Tokens", f"{counted.overall.tokens:,} of {counted.samples:,} samples, {counted.groups:,} source groups"),
    ]


def _rows(one: Study) -> list[tuple[str, Slice]]:
    counted = one.counted
    return [("all tokens", counted.overall), *((each.name, each) for each in [*counted.languages, *counted.kinds])]


def _share(one: Share | None) -> tuple[str, str]:
    """A share, and its interval."""
    if one is None:
        return f.ABSENT, ""
    return f.percent(one.value), "" if one.low is None else f"{f.percent(one.low)}–{f.percent(one.high)}"


def _continued(one: Study) -> dict[str, Any] | None:
    found = one.continued
    if found is None:
        return None
    names = sorted({*found.wrong.scores, *found.right.scores})
    rows = [
        (f"a {arm.arm} token", f"{arm.completions:,}", [_share(arm.scores.get(name)) for name in names])
        for arm in (found.wrong, found.right)
    ]
    return {"columns": [*map(named, names)], "rows": rows, "caption": f"Job {found.job_id}: {judged_by(found)}"}
