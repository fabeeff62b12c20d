"""`make bench-exits`: what each shipped bundle is worth. No figure is asserted; they are printed and kept.

For each bundle, at batch 1: every policy on code that was held out when it was trained, and there the choice of the
thresholds; then those few, and at the same depth the controls `random`, `fixed` and `static`, on HumanEval's lines and
on a source tree that neither training nor choice has seen. So nothing is tuned to what it is judged on. A gain is split
by doing the same without the shortlist, and without stops. At batch 4 and 16, and contexts of 128 and 1024, speed only.

In the environment: BENCH_SAMPLES of each benchmark (150; a quality figure wants 1,500 from 100 source groups),
BENCH_SWEEP samples for the choice (60), BENCH_ROUNDS batches behind each speed (6), BENCH_BUNDLES (all that are
shipped), BENCH_SOURCE (torch), BENCH_CHOICE (what was held out). The reports, with the frontiers drawn, and the record
lie beside the table in build/bench/.
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

import shortstop
from cluster.reports.model import BenchmarkReport, Estimate, JobReport, RunReport
from cluster.reports.page import write_page
from engine.errors import BadInput
from engine.exits import TENSORS, ExitsManifest, find_bundle, read_manifest, shipped_exits, write_bundle
from engine.spec import parse_policy
from tests.bench.bundles import MODEL, NEW, SEED, SOURCE, THREADS, loading, row, speeds, stops
from tests.bench.measure import Row, printed, write

SAMPLES = int(os.environ.get("BENCH_SAMPLES", 150))
SWEEP = int(os.environ.get("BENCH_SWEEP", 60))
#: a source tree for the choice; what a bundle held out when it was trained, where the environment names none
CHOICE = os.environ.get("BENCH_CHOICE")
BUNDLES = os.environ.get("BENCH_BUNDLES", "").split() or shipped_exits()
FOLDER = Path("build/bench")
DATABASE = f"sqlite:///{FOLDER / 'exits.db'}"
#: of ROUGE-L, relative, against full depth: what the paper lost
LOSS = 0.011


# --- the policies ----------------------------------------------------------------------------------------------------


def every_policy(manifest: ExitsManifest) -> list[dict[str, Any]]:
    """A few thresholds of each policy that these exits can serve; with and without verification where it leaves."""
    points = [point for point in manifest.exit_points if point < manifest.n_layers]
    late = points[len(points) // 2 :]
    asked: list[dict[str, Any]] = [
        *({"confidence": {"threshold": one, "min_layer": late[0]}} for one in (0.7, 0.8, 0.9, 0.95, 0.98)),
        *({"confidence": {"threshold": one, "min_layer": late[-1]}} for one in (0.8, 0.9, 0.95)),
        *({"confidence": {"threshold": one, "min_layer": late[0], "kv": "recompute"}} for one in (0.9, 0.95)),
        {"margin": {"threshold": 0.9, "min_layer": late[0]}},
        {"entropy": {"threshold": 0.3, "min_layer": late[0]}},
        *({"state-similarity": {"threshold": one}} for one in (0.98, 0.995)),
        {"position": {"deepest": manifest.n_layers, "shallowest": late[-1], "over": NEW}},
        *({"self-speculative": {"exit_layer": point}} for point in points[-3:]),
    ]
    if len(points) > 2:
        asked.append({"patience": {"patience": 2}})
    if manifest.controller:
        asked += [{"controller": {"exit": one, "stop": 1.0}} for one in (0.6, 0.7, 0.8, 0.9)]
        asked += [{"controller": {"exit": 0.8, "stop": one}} for one in (0.8, 0.9)]
    return asked


def controls(run: RunReport, manifest: ExitsManifest) -> list[dict[str, Any]]:
    """`random`, `fixed` and `static` at the depth of a run."""
    counts = {int(layer): count for layer, count in run.summary.exit_histogram.items()}
    total = sum(counts.values())
    early = {layer: count / total for layer, count in counts.items() if layer < manifest.n_layers and count}
    if not early:
        return []
    mean = sum(layer * count for layer, count in counts.items()) / total
    points = [point for point in manifest.exit_points if point < manifest.n_layers]
    fixed = min(points, key=lambda point: abs(point - mean))
    # Layers of the second half, evenly spread, as many as the run skips on average.
    removed = max(1, round(manifest.n_layers - mean))
    spread = np.linspace(manifest.n_layers // 2, manifest.n_layers - 2, removed).round().astype(int)
    return [
        {"random": {"exit_layers": list(early), "shares": list(early.values()), "name": f"random as {run.policy}"}},
        {"fixed": {"exit_layer": fixed}},
        {"static": {"layers": sorted({int(layer) for layer in spread})}},
    ]


# --- jobs ------------------------------------------------------------------------------------------------------------


def evaluated(exits: str, benchmarks: list[dict[str, Any]], policies: list[dict[str, Any]], name: str) -> JobReport:
    """A job at batch 1 in this process, alone on its cores."""
    return shortstop.evaluate(
        {
            "name": name,
            "model": MODEL,
            "exits": exits,
            "threads": THREADS,
            "generation": {"max_new_tokens": NEW, "batch_size": 1},
            "benchmarks": benchmarks,
            "policies": ["full", *policies],
            "metrics": ["rouge_l", "es", "accepted", "token_agreement"],
            "shard_batches": 10,
        },
        database=DATABASE,
        inline=True,
    )


def with_controls(report: JobReport, policy: str, manifest: ExitsManifest) -> JobReport:
    """The same job with the controls of one policy added, at its depth on the first benchmark."""
    run = next(run for run in report.benchmarks[0].runs if run.policy == policy)
    for asked in controls(run, manifest):
        report = shortstop.add_policy(report, asked, database=DATABASE, inline=True)
    return report


@dataclass(frozen=True)
class Chosen:
    """Policies by what they were chosen for, on held-out code."""

    fastest: dict[str, Any] | None  #: within the loss
    safer: dict[str, Any] | None  #: within half of it
    controller: dict[str, Any] | None  #: the fastest one that stops nothing
    stopping: dict[str, Any] | None
    lossless: dict[str, Any]  #: verified

    @property
    def policies(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for one in (self.fastest, self.safer, self.controller, self.stopping, self.lossless):
            found += [one] if one is not None and one not in found else []
        return found


def choose(benchmark: BenchmarkReport) -> Chosen:
    """The fastest of each sort, by speed per token on held-out code."""

    def fastest(wanted: Any) -> dict[str, Any] | None:
        runs = [run for run in benchmark.challengers if run.summary.speedup_token.value and wanted(run)]
        best = max(runs, key=lambda run: run.summary.speedup_token.value or 0, default=None)
        return None if best is None else {best.kind: best.options}

    def loss(run: RunReport) -> float:
        change = run.summary.changed("rouge_l_relative").value
        return 1.0 if change is None else -change

    def drafts(run: RunReport) -> bool:
        return run.kind == "self-speculative"

    def stops(run: RunReport) -> bool:
        return run.kind == "controller" and run.options["stop"] < 1

    lossless = fastest(drafts)
    assert lossless is not None
    return Chosen(
        fastest=fastest(lambda run: loss(run) <= LOSS and not drafts(run) and not stops(run)),
        safer=fastest(lambda run: loss(run) <= LOSS / 2 and not drafts(run) and not stops(run)),
        controller=fastest(lambda run: run.kind == "controller" and not stops(run)),
        stopping=fastest(stops),
        lossless=lossless,
    )


# --- a bundle --------------------------------------------------------------------------------------------------------


def evidence(name: str) -> Iterator[Row]:
    """All rows of a bundle."""
    manifest = read_manifest(find_bundle(name))
    _check_unseen(manifest)
    held = CHOICE or next(str(entry["source"]) for entry in manifest.corpus if entry.get("held_out"))
    sweep = evaluated(
        name, [{"source": held, "samples": SWEEP, "seed": SEED}], every_policy(manifest), f"{name}: choice on {held}"
    )
    write_page(sweep, FOLDER / f"exits-{name}-choice.html")
    yield from frontier(sweep.benchmarks[0], f"{name}, choice on {held}")
    chosen = choose(sweep.benchmarks[0])
    benchmarks = [
        {"benchmark": "humaneval-lines", "samples": SAMPLES, "seed": SEED},
        {"source": SOURCE, "samples": SAMPLES, "seed": SEED},
    ]
    report = evaluated(name, benchmarks, chosen.policies, f"{name}: judged")
    best = chosen.fastest or chosen.policies[0]
    report = with_controls(report, parse_policy(best).label, manifest)
    write_page(report, FOLDER / f"exits-{name}.html")
    plain = unshortened(name, benchmarks, chosen, manifest)
    wanted = 1.25 if manifest.tunes else 1.10
    for place, benchmark in enumerate(report.benchmarks):
        where = f"{name}, {benchmark.name.split(' ')[0]}"
        yield from frontier(benchmark, where)
        yield from references(benchmark, where)
        yield from judged(benchmark, chosen, None if plain is None else plain.benchmarks[place], where, wanted)
    yield from speeds(name, [parse_policy(one) for one in (chosen.fastest, chosen.lossless) if one is not None])
    yield from stops(name, manifest)
    yield loading(name)


def frontier(benchmark: BenchmarkReport, where: str) -> Iterator[Row]:
    """Speed, quality and depth of every policy."""
    for run in benchmark.challengers:
        s = run.summary
        yield row(f"{where}: {run.policy}: speedup", s.speedup_token, "x")
        yield row(f"{where}: {run.policy}: ROUGE-L, relative change", s.changed("rouge_l_relative"), "")
        depth = Estimate(value=s.mean_exit_layer)
        yield row(f"{where}: {run.policy}: mean exit layer of {s.n_layers}", depth, "layers")


def references(benchmark: BenchmarkReport, where: str) -> Iterator[Row]:
    """What tuning did to full depth."""
    if benchmark.original is not None and benchmark.baseline is not None:
        change = benchmark.baseline.summary.changed_from_original("rouge_l_relative")
        yield row(f"{where}: tuned at full depth against the original, ROUGE-L", change, "", at_least=-0.005)


def judged(
    benchmark: BenchmarkReport, chosen: Chosen, plain: BenchmarkReport | None, where: str, wanted: float
) -> Iterator[Row]:
    """The issue's table: what was chosen elsewhere, judged here, and what the gain is made of."""
    groups = f"{benchmark.samples} samples"
    if chosen.fastest is not None:
        run = _run(benchmark, chosen.fastest)
        s = run.summary
        yield row(f"{where}, {groups}: chosen for at most 1.1 % loss: speedup", s.speedup_token, "x", at_least=wanted)
        yield row(f"{where}, {groups}: its ROUGE-L, relative change", s.changed("rouge_l_relative"), "", at_least=-LOSS)
        if plain is not None:
            yield from split(s.speedup_token, _run(plain, chosen.fastest).summary.speedup_token, where)
    if chosen.stopping is not None:
        with_stops = _run(benchmark, chosen.stopping).summary
        yield row(f"{where}: with stops: speedup per token", with_stops.speedup_token, "x")
        yield row(f"{where}: with stops: speedup per request", with_stops.speedup_request, "x")
    if chosen.controller is not None:
        without = _run(benchmark, chosen.controller).summary
        yield row(f"{where}: controller without stops: speedup per request", without.speedup_request, "x")
    lossless = _run(benchmark, chosen.lossless).summary
    yield row(f"{where}: without any loss, {chosen.lossless}: speedup", lossless.speedup_token, "x")


def split(whole: Estimate, unshortened: Estimate, where: str) -> Iterator[Row]:
    """The gain with full heads, and its share of the gain: what is left comes from the shortlist."""
    yield row(f"{where}: the same without the shortlist: speedup", unshortened, "x")
    if whole.value is not None and unshortened.value is not None and whole.value > 1:
        share = Estimate(value=(unshortened.value - 1) / (whole.value - 1))
        yield row(f"{where}: share of the gain from leaving early", share, "")


def unshortened(
    name: str, benchmarks: list[dict[str, Any]], chosen: Chosen, manifest: ExitsManifest
) -> JobReport | None:
    """What was chosen for its speed, with heads over the whole vocabulary; None where they are that already."""
    if manifest.shortlist is None or manifest.head == "untied" or chosen.fastest is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        tensors = load_file(find_bundle(name) / TENSORS)
        del tensors["shortlist"]
        write_bundle(Path(folder) / "whole", manifest.model_copy(update={"shortlist": None}), tensors)
        report = evaluated(f"{folder}/whole", benchmarks, [chosen.fastest], f"{name}: without the shortlist")
        write_page(report, FOLDER / f"exits-{name}-unshortened.html")
        return report


# --- small things ----------------------------------------------------------------------------------------------------


def _run(benchmark: BenchmarkReport, asked: dict[str, Any]) -> RunReport:
    label = parse_policy(asked).label
    return next(run for run in benchmark.runs if run.policy == label)


def _check_unseen(manifest: ExitsManifest) -> None:
    if SOURCE in {entry.get("source") for entry in manifest.corpus}:
        raise BadInput(f"BENCH_SOURCE: {SOURCE!r} is in the bundle's corpus; name a tree that no training saw.")


def main() -> None:
    """Print the table and write it to build/bench/exits.json."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    write("exits", printed(row for name in BUNDLES for row in evidence(name)))


if __name__ == "__main__":
    main()
