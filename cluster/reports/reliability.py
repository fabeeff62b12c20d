"""Reliability diagrams of a bundle's controller on held-out code, as one HTML file that needs nothing else.

A point is a tenth of the probabilities that the controller gave: how sure it was on average, against how often it was
so. On the diagonal its probabilities are shares (DeGroot and Fienberg 1983).
"""

from pathlib import Path
from typing import Any

from jinja2 import PackageLoader
from markupsafe import Markup

from cluster.reports import formats
from cluster.reports.figures import Figure, axis, layout
from cluster.reports.page import asset, content_security_policy, environment, json_block, plotly
from engine.errors import BadInput
from engine.exits import Bin, ExitsManifest

_COLOURS = {"exit": "var(--faster)", "stop": "var(--stop)"}
#: what the table under the diagrams shows, by heading; of each class
_SCORES = {"base rate": "base_rate", "precision": "precision", "recall": "recall", "AUROC": "auroc"}


def write_reliability(manifest: ExitsManifest, name: str, path: Path) -> None:
    """Write the page. Raises `BadInput` where there is nothing to show, or the file cannot be written."""
    if not manifest.reliability:
        raise BadInput(
            f"exits {name!r}: no reliability was recorded for it; train a controller with `shortstop train`."
        )
    try:
        path.write_text(render_reliability(manifest, name), encoding="utf-8", newline="\n")
    except OSError as error:
        raise BadInput(f"html: {str(path)!r} cannot be written ({error.strerror}); name another file.") from None


def render_reliability(manifest: ExitsManifest, name: str) -> str:
    """The whole page as text."""
    scripts = {"plotly": plotly(), "page": asset("page.js")}
    charts = {f"point-{point}": diagram(bins) for point, bins in manifest.reliability.items()}
    return (
        environment(PackageLoader("cluster.reports"))
        .get_template("reliability.html.j2")
        .render(
            name=name,
            manifest=manifest,
            points=list(manifest.reliability),
            columns=list(_SCORES),
            rows=list(score_rows(manifest)),
            charts=Markup(json_block(charts)),
            style=Markup(asset("page.css")),
            scripts={script: Markup(text) for script, text in scripts.items()},
            policy=content_security_policy(list(scripts.values())),
        )
    )


def score_rows(manifest: ExitsManifest) -> list[tuple[str, str, list[str]]]:
    """Exit point, class, and the class's scores there, in the order of the table's columns."""
    return [
        (point, cls, [formats.score(manifest.scores.get(point, {}).get(f"{cls}_{key}")) for key in _SCORES.values()])
        for point in manifest.reliability
        for cls in manifest.reliability[point]
    ]


def diagram(bins: dict[str, list[Bin]]) -> Figure:
    """Of one exit point: a line a class, points as large as they have places."""
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter", "mode": "lines", "x": [0, 1], "y": [0, 1], "hoverinfo": "skip", "showlegend": False,
            "line": {"color": "var(--axis)", "dash": "dot", "width": 1},
        }
    ]  # fmt: skip
    for cls, found in bins.items():
        most = max((count for *_, count in found), default=1)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": cls,
                "x": [said for said, _, _ in found],
                "y": [so for _, so, _ in found],
                "text": [
                    f"{cls}: said {said:.2f}, so {so:.2f}, {formats.count(count)} places" for said, so, count in found
                ],
                "hoverinfo": "text",
                "line": {"color": _COLOURS[cls], "width": 1.5},
                "marker": {"color": _COLOURS[cls], "size": [6 + 14 * (count / most) ** 0.5 for *_, count in found]},
            }
        )
    return {
        "data": traces,
        "layout": layout(height=320)
        | {
            "margin": {"l": 52, "r": 12, "t": 12, "b": 48},
            "hovermode": "closest",
            "showlegend": True,
            "legend": {"x": 0.02, "y": 0.98, "font": {"size": 12, "color": "var(--ink)"}, "bgcolor": "rgba(0,0,0,0)"},
            "xaxis": axis("Probability that the controller gave") | {"range": [-0.02, 1.04]},
            "yaxis": axis("Share that was so") | {"range": [-0.02, 1.04]},
        },
    }
