"""A comparison's charts as plotly figures: how much changed, and where completions part."""

from cluster.comparing import words
from cluster.comparing.model import Difference, PairComparison
from cluster.reports.figures import Figure, axis, layout

_COLOURS = {"worse": "--slower", "better": "--faster", "": "--muted"}
_SYMBOLS = {"worse": "square", "better": "circle", "": "diamond"}
#: pixels of a metric, and of the axis
_ROW, _AXIS = 34, 80
#: bars of the first places; what parts later stands in the last
_PLACES = 24


def forest(pair: PairComparison) -> Figure | None:
    """Relative changes with their intervals, a row a metric; None where there is no share of anything."""
    shown = [one for one in pair.differences if one.relative.value is not None]
    if not shown:
        return None
    names = [_name(one, shown) for one in shown]
    traces = []
    for standing, colour in _COLOURS.items():
        mine = [(one, name) for one, name in zip(shown, names, strict=True) if words.standing(one) == standing]
        if mine:
            traces.append(_points(mine, standing or "may be chance", colour, _SYMBOLS[standing]))
    return {
        "data": traces,
        "layout": layout(height=_ROW * len(shown) + _AXIS)
        | {
            "margin": {"l": 8, "r": 20, "t": 28, "b": 44},
            "hovermode": "closest",
            "showlegend": True,
            "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "font": {"size": 11}},
            "xaxis": axis("Change from A to B, percent") | {"nticks": 7, "ticksuffix": "%"},
            "yaxis": axis("")
            | {"categoryorder": "array", "categoryarray": names[::-1], "automargin": True, "showgrid": False},
            "shapes": [
                {"type": "line", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "yref": "paper", "layer": "below"}
                | {"line": {"color": "var(--full)", "width": 1, "dash": "dot"}}
            ],
        },
    }


def _name(one: Difference, shown: list[Difference]) -> str:
    same = [other for other in shown if other.metric == one.metric]
    name = one.metric if len(same) == 1 else f"{one.metric} {same.index(one) + 1}"
    return name.replace("<", "‹")


def _points(mine: list[tuple[Difference, str]], name: str, colour: str, symbol: str) -> Figure:
    values = [100 * (one.relative.value or 0.0) for one, _ in mine]
    highs, lows = ([_reach(one, end) for one, _ in mine] for end in ("high", "low"))
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": values,
        "y": [label for _, label in mine],
        "error_x": {"type": "data", "symmetric": False, "array": highs, "arrayminus": lows}
        | {"color": f"var({colour})", "thickness": 2, "width": 0},
        "marker": {"color": f"var({colour})", "size": 11, "symbol": symbol},
        "hovertext": [
            f"{label}: {words.signed_percent(one.relative.value)}, {words.signed_percents(one.relative)}"
            for one, label in mine
        ],
        "hoverinfo": "text",
        "cliponaxis": False,
    }


def _reach(one: Difference, end: str) -> float:
    at, value = getattr(one.relative, end), one.relative.value
    return 0.0 if at is None or value is None else 100 * abs(at - value)


def divergence(pair: PairComparison) -> Figure | None:
    """At which token completions part, samples by place; None where none does."""
    counts = {int(place): count for place, count in pair.agreement.first_divergence.items()}
    if not counts:
        return None
    last = min(max(counts), _PLACES)
    heights = [counts.get(place, 0) for place in range(last)]
    heights.append(sum(count for place, count in counts.items() if place >= last))
    labels = [str(place + 1) for place in range(last)] + [f"{last + 1}" + ("+" if max(counts) > last else "")]
    return {
        "data": [
            {
                "type": "bar",
                "x": labels,
                "y": heights,
                "marker": {"color": "var(--accent)"},
                "hovertext": [f"token {label}: {count:,}" for label, count in zip(labels, heights, strict=True)],
                "hoverinfo": "text",
            }
        ],
        "layout": layout(height=280)
        | {
            "margin": {"l": 48, "r": 12, "t": 12, "b": 48},
            "showlegend": False,
            "xaxis": axis("First token that differs") | {"type": "category", "nticks": 12, "showgrid": False},
            "yaxis": axis("Samples") | {"rangemode": "tozero", "nticks": 6},
        },
    }
