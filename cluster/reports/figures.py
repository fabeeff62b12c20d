"""The page's charts as plotly figures: plain dicts whose colours are names of CSS variables, resolved in the browser.

Texts that plotly shows understand a little HTML, so every name that came from outside is escaped.
"""

from collections.abc import Callable, Iterable
from html import escape
from typing import Any, Literal

from cluster.reports import formats
from cluster.reports.model import BenchmarkReport, Estimate, JobReport, RunReport, RunSummary

Figure = dict[str, Any]
Per = Literal["token", "request"]

SPEEDUP: dict[Per, Callable[[RunSummary], Estimate]] = {
    "token": lambda summary: summary.speedup_token,
    "request": lambda summary: summary.speedup_request,
}

#: pixels of one policy in the histogram, and of its axis
ROW_HEIGHT, AXIS_HEIGHT = 88, 56

#: least and most pixels of the scatter; in between it is as high as the histogram beside it
SCATTER_HEIGHT = (380, 600)

#: share of a policy's row that its bars have; its name has the rest
BARS = 0.74

#: least percent that is kept free under the axis where completions stopped, for the bars' numbers
STOPS_ROOM = 30

#: shares below this get no number over their bar: the numbers would run into each other
LABELLED_SHARE = 0.02


def exit_layers(report: JobReport) -> list[int]:
    """The layers at which some token left early or some completion stopped, rising; full depth is not one of them."""
    seen = {layer for run in report.runs for layer in _decided_at(run.summary)}
    return sorted(seen - {run.summary.n_layers for run in report.runs})


def scatter(benchmark: BenchmarkReport, per: Per) -> Figure | None:
    """Speedup against `rouge_l` with 95 % intervals and the full-depth point; None where nothing was timed."""
    baseline, speedup = benchmark.baseline, SPEEDUP[per]
    placed = [run for run in benchmark.challengers if _is_placed(run, speedup)]
    if not placed or baseline is None or baseline.summary.metric("rouge_l").value is None:
        return None
    full = baseline.summary.metric("rouge_l")
    traces = [
        _points([baseline], lambda _: Estimate(value=1.0), "full depth", "--full", "diamond") | {"mode": "markers"},
        _points(_originals(benchmark, speedup), speedup, "as it came", "--full", "diamond-open") | {"mode": "markers"},
        _points([run for run in placed if not _below_one(run, speedup)], speedup, "faster", "--faster", "circle"),
        _points([run for run in placed if _below_one(run, speedup)], speedup, "slowdown", "--slower", "square"),
    ]
    shown = [*placed, *_originals(benchmark, speedup)]
    speeds = _padded([1.0, *_ends(speedup(run.summary) for run in shown)])
    quality = _padded(_ends([full, *(run.summary.metric("rouge_l") for run in shown)]))
    return {
        "data": [_front([baseline, *placed], speedup), *(trace for trace in traces if trace["x"])],
        "layout": layout(height=sorted([*SCATTER_HEIGHT, _histogram_height(benchmark.runs)])[1])
        | {
            "margin": {"l": 52, "r": 12, "t": 26, "b": 48},
            "hovermode": "closest",
            "showlegend": False,
            "xaxis": axis(f"Speedup per {per}") | {"range": speeds, "ticksuffix": "×", "nticks": 7},
            "yaxis": axis("ROUGE-L") | {"range": quality, "nticks": 6},
            "shapes": [_slow_side(speeds), line_at("x", 1.0), line_at("y", full.value or 0)],
            "annotations": [
                _side("← slower", 1.0, "right"),
                _side("faster →", 1.0, "left"),
                _full_depth_name(baseline, full.value or 0),
            ],
        },
    }


def histogram(benchmark: BenchmarkReport, layers: list[int]) -> Figure | None:
    """Where tokens were decided, in percent of a policy's tokens and stops, a row a policy; None without tokens."""
    runs = [run for run in benchmark.runs if _decided_at(run.summary)]
    if not runs:
        return None
    depth = max(run.summary.n_layers or max(_decided_at(run.summary)) for run in runs)
    figure: Figure = {"data": [], "layout": _histogram_layout(runs, depth, layers)}
    for row, run in enumerate(runs, start=1):
        figure["data"] += [_tokens_bars(run, row, layers), _stops_bars(run, row)]
    return figure


def layer_colour(layer: int, layers: list[int]) -> str:
    """The CSS variable of an exit layer's colour."""
    return f"var(--layer-{layer})" if layer in layers else "var(--full)"


def _is_placed(run: RunReport, speedup: Callable[[RunSummary], Estimate]) -> bool:
    return speedup(run.summary).value is not None and run.summary.metric("rouge_l").value is not None


def _below_one(run: RunReport, speedup: Callable[[RunSummary], Estimate]) -> bool:
    return (speedup(run.summary).value or 0) < 1


def _points(
    runs: list[RunReport], speedup: Callable[[RunSummary], Estimate], name: str, colour: str, symbol: str
) -> Figure:
    speeds = [speedup(run.summary) for run in runs]
    quality = [run.summary.metric("rouge_l") for run in runs]
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": name,
        "x": [speed.value for speed in speeds],
        "y": [score.value for score in quality],
        "error_x": _bars(speeds, colour),
        "error_y": _bars(quality, colour),
        "text": [run.mark for run in runs],
        "textfont": {"color": "var(--surface)", "size": 11, "weight": 700},
        "marker": {
            "symbol": symbol,
            "size": 14 if symbol == "diamond" else 19,
            "color": f"var({colour})",
            "line": {"color": "var(--surface)", "width": 2},
            "opacity": 1,
        },
        "hovertext": [_hover(run, speed) for run, speed in zip(runs, speeds, strict=True)],
        "hoverinfo": "text",
        "cliponaxis": False,
    }


def _front(runs: list[RunReport], speedup: Callable[[RunSummary], Estimate]) -> Figure:
    """The Pareto front: a step through the policies that none is faster than at the same quality or better."""
    speeds = [1.0 if run.kind == "full" else speedup(run.summary).value or 0.0 for run in runs]
    places = {(speed, run.summary.metric("rouge_l").value or 0.0) for speed, run in zip(speeds, runs, strict=True)}
    ahead = sorted(at for at in places if not any(o != at and o[0] >= at[0] and o[1] >= at[1] for o in places))
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "Pareto front",
        "x": [x for x, _ in ahead],
        "y": [y for _, y in ahead],
        "line": {"color": "var(--axis)", "width": 2, "shape": "vh"},
        "hoverinfo": "skip",
    }


def _hover(run: RunReport, speed: Estimate) -> str:
    score = run.summary.metric("rouge_l")
    lines = [
        _bold_name(run),
        f"speedup {formats.times(speed.value)} {_bracketed(formats.times_interval(speed))}",
        f"ROUGE-L {formats.score(score.value)} {_bracketed(formats.score_interval(score))}",
    ]
    return "<br>".join(lines)


def _bold_name(run: RunReport) -> str:
    return f"<b>{run.mark} · {_plain(run.policy)}</b>"


def _plain(name: str) -> str:
    """A name in which plotly finds no tags; it knows entities, but not that of the quotation mark."""
    return escape(name, quote=False)


def _bracketed(interval: str) -> str:
    return f"({interval})" if interval else ""


def _bars(estimates: list[Estimate], colour: str) -> Figure:
    def reach(estimate: Estimate, end: float | None) -> float:
        return 0.0 if end is None or estimate.value is None else abs(end - estimate.value)

    return {
        "type": "data",
        "symmetric": False,
        "array": [reach(estimate, estimate.high) for estimate in estimates],
        "arrayminus": [reach(estimate, estimate.low) for estimate in estimates],
        "color": f"var({colour})",
        "thickness": 1.5,
        "width": 0,
    }


def _ends(estimates: Iterable[Estimate]) -> list[float]:
    return [end for estimate in estimates for end in (estimate.value, estimate.low, estimate.high) if end is not None]


def _padded(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    room = 0.12 * (high - low) or 0.05
    return [low - room, high + room]


def _slow_side(speeds: list[float]) -> Figure:
    place = {"x0": speeds[0], "x1": 1.0, "y0": 0, "y1": 1, "xref": "x", "yref": "paper"}
    return place | {"type": "rect", "fillcolor": "var(--slow-side)", "line": {"width": 0}, "layer": "below"}


def line_at(axis: Literal["x", "y"], at: float | str) -> Figure:
    """A dotted line across the chart."""
    along = {"x": "y", "y": "x"}[axis]
    place = {f"{axis}0": at, f"{axis}1": at, f"{along}0": 0, f"{along}1": 1, f"{axis}ref": axis, f"{along}ref": "paper"}
    return place | {"type": "line", "line": {"color": "var(--full)", "width": 1, "dash": "dot"}, "layer": "below"}


def _side(text: str, x: float, anchor: Literal["left", "right"]) -> Figure:
    place = {"x": x, "y": 1, "yref": "paper", "xanchor": anchor, "yanchor": "bottom"}
    return _note(text) | place | {"xshift": 6 if anchor == "left" else -6}


def _originals(benchmark: BenchmarkReport, speedup: Callable[[RunSummary], Estimate]) -> list[RunReport]:
    """The second reference, where there is one and it was timed."""
    return [run for run in (benchmark.original,) if run is not None and _is_placed(run, speedup)]


def _full_depth_name(baseline: RunReport, y: float) -> Figure:
    place = {"x": 1, "xref": "paper", "y": y, "xanchor": "right", "yanchor": "bottom"}
    return _note(f"{baseline.mark} · full depth") | place


def _note(text: str) -> Figure:
    return {"text": text, "font": {"size": 11, "color": "var(--muted)"}, "showarrow": False}


def _decided_at(summary: RunSummary) -> dict[int, int]:
    """Layer -> tokens and stops that were decided there."""
    decided: dict[int, int] = {}
    for histogram in (summary.exit_histogram, summary.stop_histogram):
        for layer, number in histogram.items():
            decided[int(layer)] = decided.get(int(layer), 0) + number
    return {layer: number for layer, number in decided.items() if number}


def _tokens_bars(run: RunReport, row: int, layers: list[int]) -> Figure:
    bars = _bars_of(run, run.summary.exit_histogram, row, "token", "tokens")
    return bars | {"marker": {"color": [layer_colour(layer, layers) for layer in bars["x"]]}}


def _stops_bars(run: RunReport, row: int) -> Figure:
    """Stops hang under the axis, so that position tells them from tokens as well as colour does."""
    bars = _bars_of(run, run.summary.stop_histogram, row, "stop", "stops")
    down = {"y": [-height for height in bars["y"]], "textfont": {"size": 11, "color": "var(--stop)"}}
    return bars | down | {"marker": {"color": "var(--stop)"}}


def _bars_of(run: RunReport, histogram: dict[str, int], row: int, one: str, many: str) -> Figure:
    total = sum(_decided_at(run.summary).values())
    counts = sorted((int(layer), number) for layer, number in histogram.items() if number)
    return {
        "type": "bar",
        "x": [layer for layer, _ in counts],
        "y": [100 * number / total for _, number in counts],
        "width": 0.72,
        "text": [_share_label(number / total) for _, number in counts],
        "textposition": "outside",
        "constraintext": "none",
        "textfont": {"size": 11, "color": "var(--muted)"},
        "cliponaxis": False,
        "hovertext": [
            f"{_bold_name(run)}<br>layer {layer}: {formats.count(number)} {one if number == 1 else many}"
            f" ({formats.percent(number / total)})"
            for layer, number in counts
        ],
        "hoverinfo": "text",
        "showlegend": False,
        "xaxis": "x",
        "yaxis": f"y{row}" if row > 1 else "y",
    }


def _share_label(share: float) -> str:
    return f"{100 * share:.0f}" if share >= LABELLED_SHARE else ""


def _histogram_layout(runs: list[RunReport], depth: int, layers: list[int]) -> Figure:
    made = layout(height=_histogram_height(runs)) | {
        "margin": {"l": 8, "r": 8, "t": 8, "b": 48},
        "barmode": "relative",
        "hovermode": "closest",
        "annotations": [],
        "xaxis": axis("Layer after which the token was decided")
        | {"range": [0.2, depth + 0.9], "showgrid": False, "anchor": f"y{len(runs)}" if len(runs) > 1 else "y"}
        | ({"tickvals": [1, *layers, depth]} if 0 < len(layers) <= 10 else {"nticks": 10}),
    }
    lowest = -_room_for_stops(runs)
    for row, run in enumerate(runs, start=1):
        top, bottom = 1 - (row - 1) / len(runs), 1 - row / len(runs)
        made[f"yaxis{row}" if row > 1 else "yaxis"] = {
            "domain": [bottom, bottom + (top - bottom) * BARS],
            "range": [lowest, 100],
            "showticklabels": False,
            "showgrid": False,
            "zeroline": True,
            "zerolinecolor": "var(--axis)",
            "fixedrange": True,
        }
        made["annotations"].append(_row_title(run, top))
    return made


def _room_for_stops(runs: list[RunReport]) -> float:
    """Percent to keep under the axis; the same in all rows, so that bars of one length mean one share."""
    heights = [-y for run in runs for y in _stops_bars(run, 1)["y"]]
    return max(STOPS_ROOM, max(heights) + STOPS_ROOM / 2) if heights else 0


def _histogram_height(runs: list[RunReport]) -> int:
    return ROW_HEIGHT * len(runs) + AXIS_HEIGHT


def _row_title(run: RunReport, top: float) -> Figure:
    place = {"x": 0, "y": top, "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "top"}
    font = {"size": 12, "color": "var(--ink)"}
    return _note(f"<b>{run.mark}</b>  {_plain(run.policy)}") | place | {"font": font}


def axis(title: str) -> Figure:
    """An axis as every chart has it."""
    return {
        "title": {"text": title, "font": {"size": 12, "color": "var(--muted)"}, "standoff": 10},
        "gridcolor": "var(--line)",
        "linecolor": "var(--line)",
        "tickfont": {"size": 11, "color": "var(--muted)"},
        "zeroline": False,
        "fixedrange": True,
    }


def layout(height: int) -> Figure:
    """What every chart has in common. height: pixels."""
    return {
        "height": height,
        "autosize": True,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "var(--sans)", "color": "var(--ink)"},
        "hoverlabel": {
            "bgcolor": "var(--ink)",
            "bordercolor": "var(--ink)",
            "font": {"family": "var(--sans)", "size": 12, "color": "var(--surface)"},
        },
    }
