"""The page of a replay: thresholds as sliders; quality and ideal speed move with them, computed in the browser.

The browser gets a part of the trace, in whole batches evenly spread over the benchmark, signals in 16 bits.
"""

import base64
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import PackageLoader
from markupsafe import Markup

from cluster.replays import Estimate, ReplayReport
from cluster.reports import formats as f
from cluster.reports.figures import Figure, axis, layout
from cluster.reports.page import asset, content_security_policy, environment, json_block, plotly
from cluster.traced import Trace
from engine.errors import BadInput
from engine.replay.decide import decide
from engine.replay.ideal import CostModel, Steps
from engine.replay.traced import Array, Traced
from engine.spec import Full

#: tokens that a page carries at the most, about: each takes some 80 bytes
PAGE_TOKENS = 20_000

_SCRIPTS = ("plotly", "page.js", "replay.js")
_LEVELS = 65_535
#: kinds with sliders, and what they go by; the largest entropy that a slider reaches, in nats
_SIGNALS = {
    "confidence": ("probabilities", 0.0, 1.0),
    "margin": ("margins", 0.0, 1.0),
    "entropy": ("entropies", 0.0, 12.0),
    "state-similarity": ("similarities", -1.0, 1.0),
}


@dataclass(frozen=True)
class ReplayView:
    """What the templates show."""

    title: str
    facts: list[tuple[str, str]]
    kinds: list[tuple[str, str]]  #: of policies with sliders: name in specs, name here
    sliders: list[tuple[str, str, str, int]]  #: (id, label, the kinds that have it, where it starts of 1000)
    speed_name: str
    n_layers: int
    caption: str
    columns: list[str]
    rows: list[tuple[str, list[tuple[str, str]]]]  #: the Pareto front: policy, then (value, interval)
    footer: str
    data: Markup  #: JSON for `replay.js`


def write_replay_page(trace: Trace, found: ReplayReport, path: Path) -> None:
    """Write the page to a file that needs nothing else. Raises `BadInput` where it cannot be written."""
    scripts = [plotly() if name == "plotly" else asset(name) for name in _SCRIPTS]
    page = (
        environment(PackageLoader("cluster.reports"))
        .get_template("replay.html.j2")
        .render(
            view=view_of(trace, found),
            styles=[Markup(asset(name)) for name in ("page.css", "replay.css")],
            scripts=[Markup(script) for script in scripts],
            policy=content_security_policy(scripts),
        )
    )
    try:
        path.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise BadInput(f"html: {str(path)!r} cannot be written ({error.strerror}); name another file.") from None


def view_of(trace: Trace, found: ReplayReport) -> ReplayView:
    """The view of a replay. found: over the whole trace, or the part that the page carries."""
    part, model = trace.part(PAGE_TOKENS), trace.cost_model()
    has_controller = _page_knows_controller(part)
    kinds = [("controller", "controller (SEC)")] * has_controller + [(kind, kind) for kind in _SIGNALS]
    sliders = [("threshold", "Threshold", " ".join(_SIGNALS), 900)]
    if has_controller:
        sliders = [("exit", "Exit above", "controller", 900), ("stop", "Stop above", "controller", 900), *sliders]
    speed = "Ideal speed" if model else "Depth saved"
    return ReplayView(
        title=f"{found.benchmark}: what thresholds would do",
        facts=[
            ("Trace", f"job {found.job_id}, target {found.target}"),
            ("Model", found.model),
            ("Exits", f"{found.exits or '–'}, after layers {', '.join(map(str, found.exit_points))}"),
            ("Tokens", f"{found.tokens:,} of {found.samples:,} samples, {found.groups:,} source groups"),
            ("Ideal for", f"{found.device_class}, batches of {found.batch_size}" if model else "not known here"),
        ],
        kinds=kinds,
        sliders=sliders,
        speed_name=speed,
        n_layers=found.n_layers,
        caption=(
            f"Grey: {len(found.policies):,} policies over {found.tokens:,} tokens, with the Pareto front. The sliders' "
            f"policy is computed over {len(part):,} tokens, keys and values copied. What skipped layers do to later "
            "tokens is not in a replay; shortstop replay --confirm measures it."
        ),
        columns=["Ideal speed", "Tokens right", "Agreement", "Exit layer", "Samples given up", "Lift of stops"],
        rows=[(one.policy, [_cell(one.figures.get(name), form) for name, form in _COLUMNS]) for one in found.best()],
        footer="Intervals at 95 %, over source groups. A replay is teacher-forced: tokens stand behind the target.",
        data=Markup(json_block(_data(part, model) | {"figure": _figure(found, speed)})),
    )


def _page_knows_controller(part: Traced) -> bool:
    """The page decides for all tokens at once, and one kind of controller looks at what became of the token before."""
    return part.has_controller and part.after_exit is None


_COLUMNS = (
    ("speedup_ideal", f.times),
    ("tokens_right", f.percent),
    ("agreement", f.percent),
    ("mean_exit_layer", f.layer),
    ("stop_share", f.percent),
    ("stop_lift", f.times),
)


def _cell(estimate: Estimate | None, form: Any) -> tuple[str, str]:
    if estimate is None:
        return form(None), ""
    interval = "" if estimate.low is None else f"{form(estimate.low)}–{form(estimate.high)}"
    return form(estimate.value), interval


def _data(part: Traced, model: CostModel | None) -> dict[str, Any]:
    steps = np.full(len(part), -1, np.int32)
    batch_steps = part.batches[part.sample] * (int(part.lengths.max()) + 1) + part.steps
    decoded = part.steps > 0
    numbers, steps[decoded] = np.unique(batch_steps[decoded], return_inverse=True)
    signals = {name: _signal(getattr(part, column), low, high) for name, (column, low, high) in _SIGNALS.items()}
    winners = None
    if _page_knows_controller(part):
        classes, tops = part.winners
        winners, signals["top"] = _text(classes, np.uint8), _signal(tops, 0.0, 1.0)
    return {
        "points": part.points,
        "exitPoints": part.exit_points,
        "nLayers": part.n_layers,
        "tokens": len(part),
        "steps": len(numbers),
        "signals": signals,
        "winners": winners,
        "marks": _text(part.right + 2 * part.agrees, np.uint8),
        "step": _text(steps, np.int32),
        "reach": _text(part.reach, np.int32),
        "sample": _text(part.sample, np.int32),
        "wrong": _text(part.wrong_samples, np.uint8),
        "cost": None if model is None else _cost(model),
        "full": None if model is None else _full(part, model),
    }


def _cost(model: CostModel) -> dict[str, Any]:
    return {"shape": asdict(model.shape), "heads": model.heads, **asdict(model.machine)}


def _full(part: Traced, model: CostModel) -> float:
    """Seconds of a token at full depth, at best."""
    full = Full()
    seconds = float(Steps(part, model).cost(full, decide(full, part)).sum()) / 1e9
    return seconds / max(int((part.steps > 0).sum()), 1)


def _signal(values: Array, low: float, high: float) -> dict[str, Any]:
    levels = np.clip((values - low) / (high - low), 0, 1) * _LEVELS
    return {"data": _text(np.rint(np.nan_to_num(levels)), np.uint16), "low": low, "high": high}


def _text(values: Array, kind: type[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values, np.dtype(kind).newbyteorder("<")).tobytes()).decode()


def _figure(found: ReplayReport, speed: str) -> Figure:
    placed = [
        (x, one.figures["tokens_right"].value or 0.0, one.policy, one.front)
        for one in found.policies
        if (x := _x(found, one.figures)) is not None
    ]
    front = sorted((x, y) for x, y, _, on in placed if on)
    points = {
        "type": "scatter",
        "mode": "markers",
        "x": [x for x, *_ in placed],
        "y": [y for _, y, *_ in placed],
        "hovertext": [f"{f.visible(name)}" for *_, name, _ in placed],
        "hoverinfo": "text",
        "marker": {"size": 7, "color": "var(--axis)"},
    }
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": [x for x, _ in front],
        "y": [y for _, y in front],
        "line": {"color": "var(--muted)", "width": 2, "shape": "vh"},
        "hoverinfo": "skip",
    }
    own = {
        "type": "scatter",
        "mode": "markers",
        "x": [],
        "y": [],
        "name": "sliders",
        "marker": {"size": 18, "symbol": "diamond", "color": "var(--accent)"},
        "hoverinfo": "skip",
    }
    return {
        "data": [points, line, own],
        "layout": layout(height=420)
        | {
            "margin": {"l": 60, "r": 12, "t": 12, "b": 48},
            "hovermode": "closest",
            "showlegend": False,
            "xaxis": axis(speed) | {"ticksuffix": "×"},
            "yaxis": axis("Tokens right") | {"tickformat": ".2~%"},
        },
    }


def _x(found: ReplayReport, figures: dict[str, Estimate]) -> float | None:
    if "speedup_ideal" in figures:
        return figures["speedup_ideal"].value
    depth = figures["mean_exit_layer"].value
    return None if not depth else found.n_layers / depth
