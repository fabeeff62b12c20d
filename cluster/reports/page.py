"""The report as one HTML file that needs nothing else and asks nothing of the network.

What models wrote is hostile: every text is escaped by the template, chart data is JSON in which no tag can begin, and
the page's content security policy runs only the two scripts that stand here, known by their hashes.
"""

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import BaseLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cluster.reports import figures, formats
from cluster.reports.model import BenchmarkReport, ExampleToken, JobReport, is_slowdown
from cluster.reports.notes import benchmark_notes, headline, job_notes
from engine.errors import BadInput

#: exit layers from the earliest to the latest that occurs, in between blended; light and dark
RAMP = {"light": ("#7a1fa2", "#2f6fd0", "#0f8a76"), "dark": ("#d39bf7", "#82b1ff", "#45c9ae")}

#: examples that are unfolded when the page opens
OPEN_EXAMPLES = 2


def write_page(report: JobReport, path: Path) -> None:
    """Write the page to a file. Raises `BadInput` where it cannot be written."""
    page = render_page(report)
    try:
        path.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise BadInput(f"html: {str(path)!r} cannot be written ({error.strerror}); name another file.") from None


def render_page(report: JobReport) -> str:
    """The whole page as text."""
    layers = figures.exit_layers(report)
    scripts = {"plotly": plotly(), "page": asset("page.js")}
    return (
        environment(PackageLoader("cluster.reports"))
        .get_template("page.html.j2")
        .render(
            report=report,
            job_notes=job_notes(report),
            facts=facts(report),
            provenance=provenance(report),
            layers=layers,
            ramp=ramp(layers),
            charts=Markup(json_block(charts(report, layers))),
            style=Markup(asset("page.css")),
            scripts={name: Markup(script) for name, script in scripts.items()},
            policy=content_security_policy(list(scripts.values())),
            open_examples=OPEN_EXAMPLES,
        )
    )


def environment(loader: BaseLoader) -> Environment:
    """Templates that escape every text, with the names that `parts.html.j2` uses."""
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.globals |= {
        "f": formats,
        "notes_of": benchmark_notes,
        "headline": headline,
        "colour": figures.layer_colour,
        "is_slowdown": is_slowdown,
        "tip": _tip,
        "depth_of": _depth_of,
    }
    return made


def asset(name: str) -> str:
    """A style sheet or script of the report."""
    return files("cluster.reports").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def plotly() -> str:
    """The chart library."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def content_security_policy(scripts: list[str]) -> str:
    """Nothing is loaded; only these scripts run. plotly places its elements by inline styles."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    nothing = "default-src 'none'; base-uri 'none'; form-action 'none'"
    return f"{nothing}; script-src {allowed}; style-src 'unsafe-inline'; img-src data:"


def json_block(value: Any) -> str:
    """JSON for a script element: no character in it can end the element or begin a tag."""
    written = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return written.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def charts(report: JobReport, layers: list[int]) -> dict[str, figures.Figure]:
    """All figures by the name under which the template places them; those without data are absent."""
    found: dict[str, figures.Figure | None] = {}
    for number, benchmark in enumerate(report.benchmarks):
        found[f"scatter-{number}-token"] = figures.scatter(benchmark, "token")
        found[f"scatter-{number}-request"] = figures.scatter(benchmark, "request")
        found[f"layers-{number}"] = figures.histogram(benchmark, layers)
    return {name: figure for name, figure in found.items() if figure}


def ramp(layers: list[int]) -> dict[str, dict[int, str]]:
    """A colour for every exit layer that occurs, light and dark."""
    span = max(len(layers) - 1, 1)
    return {
        scheme: {layer: _blend(ends, place / span) for place, layer in enumerate(layers)}
        for scheme, ends in RAMP.items()
    }


def _blend(stops: tuple[str, ...], at: float) -> str:
    """The colour at `at` (0..1) on a ramp of equally spaced stops."""
    place = at * (len(stops) - 1)
    left = min(int(place), len(stops) - 2)
    low, high = (bytes.fromhex(stop[1:]) for stop in stops[left : left + 2])
    return "#" + bytes(round(a + (b - a) * (place - left)) for a, b in zip(low, high, strict=True)).hex()


def _depth_of(benchmark: BenchmarkReport) -> int:
    """The model's number of layers, as far as the report knows it."""
    known = [run.summary.n_layers for run in benchmark.runs if run.summary.n_layers]
    tokens = [t.exit_layer for example in benchmark.examples for c in example.completions for t in c.tokens]
    return max([*known, *tokens], default=1)


def _tip(token: ExampleToken, depth: int, diverges: bool) -> str:
    """What is said of a token when it is pointed at."""
    of = f"layer {token.exit_layer} of {depth}"
    said = {"full": f"full depth, {of}", "exit": f"exit after {of}", "stop": f"stop at {of}"}[token.decision]
    if token.probability is not None:
        said += f" · probability {'of stopping ' if token.decision == 'stop' else ''}{token.probability:.3f}"
    if token.layers_run != token.exit_layer:
        said += f" · {token.layers_run} layers run in the end"
    if token.draft_layer is not None:
        agreed = "full depth agreed" if token.draft_kept else "full depth chose this instead"
        said += f" · drafted after layer {token.draft_layer}, {agreed}"
    return f"{said} · first token that differs from full depth" if diverges else said


def facts(report: JobReport) -> list[tuple[str, str]]:
    """The strip under the title."""
    pinned, ended, started = report.provenance, report.finished_at, report.started_at
    took = ended - started if ended is not None and started is not None else None
    known = [
        ("Model", report.model or None),
        ("Exits", (report.exits or "none") if report.model else None),
        ("Machine", pinned.get("device_class")),
        ("Threads", pinned.get("threads")),
        ("Batch size", pinned.get("batch_size")),
        ("Compile", pinned.get("compile")),
        ("New tokens", pinned.get("max_new_tokens")),
        ("Finished", formats.moment(ended) if ended is not None else None),
        ("Took", formats.duration(took) if took is not None else None),
    ]
    return [(name, str(value)) for name, value in known if value is not None]


def provenance(report: JobReport) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of named values: what was pinned, what is nested in it, the benchmarks, and kernels by device class."""
    pinned = {key: value for key, value in report.provenance.items() if key != "kernels"}
    plain = [(_words(key), _plain(value)) for key, value in pinned.items() if not isinstance(value, dict)]
    nested = [
        (_words(key), [(str(name), _plain(inner)) for name, inner in value.items()])
        for key, value in pinned.items()
        if isinstance(value, dict) and value and key != "benchmarks"
    ]
    benchmarks = [(found.name, f"version {found.version}, {found.content_hash}") for found in report.benchmarks]
    return [("Job", plain), ("Benchmarks", benchmarks), *nested, *_kernels(report)]


def _kernels(report: JobReport) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each shape of matrix the kernels that multiplied it, from one token at a time to many."""
    return [
        (f"Kernels on {name}", [(shape, _plain(kernels)) for shape, kernels in by_shape.items()])
        for name, by_shape in report.provenance.get("kernels", {}).items()
    ]


def _words(key: str) -> str:
    return key.replace("_", " ").capitalize()


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    return json.dumps(value) if isinstance(value, dict) else str(value)
