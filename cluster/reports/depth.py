"""Depth over position: the mean exit layer of the first token, the second, and so on, a line a policy.

No sum tells of positions, so that this is read from tokens: of the benchmark's first samples, as many as `TOKENS_READ`
allows.
"""

from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from cluster.reports.figures import Figure, axis, layout
from cluster.reports.model import BenchmarkReport, Part, RunReport
from db import results
from db.session import Database

#: of one run; a benchmark's first samples, whole windows of them
TOKENS_READ = 20_000

#: positions that are drawn, and the fewest tokens that make a mean
POSITIONS, FEWEST = 64, 5

#: hover texts, dashes and colours take turns, so that lines differ where they cross
DASHES = ("solid", "dash", "dot", "dashdot")
COLOURS = 6


class Curve(Part):
    """One policy on one benchmark."""

    run_id: int
    mark: str
    policy: str
    samples: int  #: that were read
    positions: list[int]  #: from 1
    mean_exit_layer: list[float]  #: of the tokens there; stops are not counted
    tokens: list[int]  #: how many it is the mean of


@dataclass
class _Sums:
    layers: np.ndarray
    tokens: np.ndarray
    samples: int = 0


def curves(db: Database, benchmark: BenchmarkReport) -> list[Curve]:
    """A curve a policy, of those that have tokens."""
    found = [_curve(db, run) for run in benchmark.runs]
    return [curve for curve in found if curve.positions]


def _curve(db: Database, run: RunReport) -> Curve:
    sums = _Sums(np.zeros(POSITIONS + 1), np.zeros(POSITIONS + 1, np.int64))
    read = 0
    for batch in results.tokens(db, run_id=run.run_id):
        kept = (batch.position <= POSITIONS) & (batch.token_id >= 0)
        np.add.at(sums.layers, batch.position[kept], batch.exit_layer[kept])
        np.add.at(sums.tokens, batch.position[kept], 1)
        sums.samples += len(np.unique(batch.sample_id))
        read += len(batch)
        if read >= TOKENS_READ:
            break
    places = list(takewhile(lambda place: sums.tokens[place] >= FEWEST, range(1, POSITIONS + 1)))
    return Curve(
        run_id=run.run_id,
        mark=run.mark,
        policy=run.policy,
        samples=sums.samples,
        positions=places,
        mean_exit_layer=[float(sums.layers[place] / sums.tokens[place]) for place in places],
        tokens=[int(sums.tokens[place]) for place in places],
    )


def depth_figure(found: list[Curve], n_layers: int | None) -> Figure | None:
    """The curves as a plotly figure; None without any."""
    if not found:
        return None
    deepest = n_layers or max(max(curve.mean_exit_layer) for curve in found)
    return {
        "data": [_line(curve, place) for place, curve in enumerate(found)],
        "layout": layout(height=380)
        | {
            "margin": {"l": 52, "r": 28, "t": 12, "b": 48},
            "hovermode": "closest",
            "showlegend": False,
            "xaxis": axis("Position of the token in its completion") | {"rangemode": "tozero", "nticks": 10},
            "yaxis": axis("Mean exit layer") | {"range": [0, deepest * 1.06], "nticks": 7},
        },
    }


def _line(curve: Curve, place: int) -> Figure:
    colour = f"var(--series-{place % COLOURS})"
    last = len(curve.positions) - 1
    return {
        "type": "scatter",
        "mode": "lines+markers+text",
        "name": curve.mark,
        "x": curve.positions,
        "y": curve.mean_exit_layer,
        "text": [curve.mark if at == last else "" for at in range(last + 1)],
        "textposition": "middle right",
        "textfont": {"size": 12, "color": colour, "weight": 700},
        "line": {"color": colour, "width": 2, "dash": DASHES[place % len(DASHES)]},
        "marker": {"color": colour, "size": 5},
        "hovertext": [
            f"{curve.mark} · position {at}: layer {layer:.1f}, mean of {tokens:,}"
            for at, layer, tokens in zip(curve.positions, curve.mean_exit_layer, curve.tokens, strict=True)
        ],
        "hoverinfo": "text",
        "cliponaxis": False,
    }
