"""`make bench-exits`: what each shipped bundle is worth. No figure is asserted; they are printed and kept.

For each bundle, on code that was held out when it was trained: a trace, a replay of every policy with many thresholds,
the few on its front live, with a preview behind the last layer, and the choice among them by quality and by speed at
batch 1. Then only what was chosen, and at its depth the controls, on HumanEval's lines and on a source tree
that neither training nor choice has seen: nothing is tuned to what it is judged on. Speeds are those of batch 1.
Quality is counted again on more samples in batches of 16, for rows decide alone. A gain is split by doing the same
without shortlist and preview, with nothing but the preview, and without stops; and traces say what every policy would
do at the depth of the chosen one, beside `random` and the oracle.

In the environment: BENCH_BUNDLES (all that are shipped), BENCH_SAMPLES of each benchmark behind a speed (30),
BENCH_QUALITY behind a quality (200; the issue wants 1,500), BENCH_SWEEP behind the choice (120), BENCH_ROUNDS batches
behind the speeds by batch and context (4), BENCH_SOURCE (torch), BENCH_CHOICE (what was held out). So set it takes
about 15 minutes a bundle. Pages with the frontiers, and the record, lie beside the table in build/bench/.
"""

import os
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

import shortstop
from cluster import jobs
from cluster.grids import ReplaySpec
from cluster.replays import ReplayedPolicy, ReplayReport, replay_trace
from cluster.reports.model import BenchmarkReport, Estimate, JobReport, RunReport
from cluster.reports.page import write_page
from cluster.reports.replay_page import write_replay_page
from cluster.spec import parse_job
from cluster.traced import Trace, trace_of
from db.session import Database, open_database
from engine.errors import BadInput
from engine.exits import TENSORS, ExitsManifest, find_bundle, read_manifest, shipped_exits, write_bundle
from engine.spec import parse_policy
from tests.bench.bundles import MODEL, NEW, SEED, SOURCE, THREADS, loading, row, speeds, stops
from tests.bench.measure import Row, printed, write

SAMPLES = int(os.environ.get("BENCH_SAMPLES", 30))
QUALITY = int(os.environ.get("BENCH_QUALITY", 200))
SWEEP = int(os.environ.get("BENCH_SWEEP", 120))
#: a source tree for the choice; what a bundle held out when it was trained, where the environment names none
CHOICE = os.environ.get("BENCH_CHOICE")
BUNDLES = os.environ.get("BENCH_BUNDLES", "").split() or shipped_exits()
FOLDER = Path("build/bench")
DATABASE = f"sqlite:///{FOLDER / 'exits.db'}"
#: of ROUGE-L, relative, against full depth: what the paper lost
LOSS = 0.011
#: shares of tokens that agree with full depth: at each the fastest policy is tried live
LEVELS = (0.997, 0.994, 0.99, 0.98, 0.97, 0.95)
#: tokens whose logits are computed behind the last layer
PREVIEWS = (1024,)
#: of what is hopeless a stopping controller finds this share
RECALL = 0.3

Asked = dict[str, Any]  #: a policy or a benchmark, as a spec takes it


# --- the policies ----------------------------------------------------------------------------------------------------


def every_policy(manifest: ExitsManifest) -> list[Any]:
    """Many thresholds of each policy that these exits can serve and a trace can answer."""
    points = _points(manifest)
    steps = {"from": 0.5, "to": 0.995, "steps": 34}
    asked: list[Any] = [
        {"confidence": {"threshold": steps, "min_layer": points}},
        {"margin": {"threshold": steps, "min_layer": points}},
        {"entropy": {"threshold": {"from": 0.01, "to": 2.0, "steps": 34}, "min_layer": points}},
        {"state-similarity": {"threshold": {"from": 0.9, "to": 0.999, "steps": 34}, "min_layer": points}},
        {"fixed": {"exit_layer": points}},
        {"position": {"deepest": manifest.n_layers, "shallowest": points, "over": NEW}},
    ]
    if len(points) > 2:
        asked.append({"patience": {"patience": list(range(1, len(points) - 1)), "min_layer": points[:2]}})
    if manifest.controller:
        asked.append({"controller": {"exit": steps, "stop": 1.0, "min_layer": points}})
        asked += [{"confidence": {"threshold": steps, "min_layer": points, "ask_above": [0.2, 0.3, 0.4, 0.5, 0.6]}}]
    return asked


def controls(run: RunReport, manifest: ExitsManifest) -> list[Asked]:
    """`random`, `fixed` and `static` at the depth that a run had."""
    counts = {int(layer): count for layer, count in run.summary.exit_histogram.items()}
    total = sum(counts.values())
    early = {layer: count / total for layer, count in counts.items() if layer < manifest.n_layers and count}
    if not early:
        return []
    mean = sum(layer * count for layer, count in counts.items()) / total
    fixed = min(_points(manifest), key=lambda point: abs(point - mean))
    # Layers of the second half, evenly spread, as many as the run skips on average.
    removed = max(1, round(manifest.n_layers - mean))
    spread = np.linspace(manifest.n_layers // 2, manifest.n_layers - 2, removed).round().astype(int)
    return [
        {"random": {"exit_layers": list(early), "shares": list(early.values()), "name": f"random as {run.policy}"}},
        {"fixed": {"exit_layer": fixed}},
        {"static": {"layers": sorted({int(layer) for layer in spread})}},
    ]


# --- jobs ------------------------------------------------------------------------------------------------------------


def evaluated(exits: str, benchmarks: list[Asked], policies: list[Asked], name: str, batch_size: int = 1) -> JobReport:
    """A job in this process, alone on its cores."""
    report = shortstop.evaluate(
        _spec(exits, benchmarks, name, batch_size)
        | {"policies": ["full", *policies], "metrics": ["rouge_l", "es", "accepted", "token_agreement"]},
        database=DATABASE,
        inline=True,
    )
    assert report.state == "done", report.error
    return report


def traced(db: Database, exits: str, benchmark: Asked, name: str) -> Trace:
    """A trace of references, in batches of one: what a replay says of speed is said of batch 1."""
    job_id = jobs.submit(db, parse_job(_spec(exits, [benchmark], name, 1) | {"trace": "reference"}))
    state = jobs.work(db, job_id, inline=True)
    assert state is jobs.JobState.DONE, state
    return trace_of(db, job_id)


def _spec(exits: str, benchmarks: list[Asked], name: str, batch_size: int) -> dict[str, Any]:
    return {
        "name": name,
        "model": MODEL,
        "exits": exits,
        "threads": THREADS,
        "generation": {"max_new_tokens": NEW, "batch_size": batch_size},
        "benchmarks": benchmarks,
        "shard_batches": 10,
    }


def source_code(source: str, samples: int) -> Asked:
    """The paper's protocol: short prompts, cut anywhere, a file each while there are some."""
    return {"source": source, "task": "random-cut", "samples": samples, "seed": SEED}


def human_eval(samples: int) -> Asked:
    return {"benchmark": "humaneval-lines", "samples": samples, "seed": SEED}


# --- the choice ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """Policies by what they were chosen for, on held-out code."""

    fastest: Asked | None  #: within the loss, and by the cost model faster at batch 1 than full depth
    controller: Asked | None  #: the fastest one that stops nothing
    stopping: Asked | None
    preview: Asked | None  #: nobody leaves early; behind the last layer few logits are computed
    lossless: Asked  #: verified
    controls: list[Asked]  #: at the depth of the fastest

    @property
    def policies(self) -> list[Asked]:
        found: list[Asked] = []
        for one in (self.fastest, self.preview, self.controller, self.stopping, self.lossless, *self.controls):
            found += [one] if one is not None and one not in found else []
        return found


def choice(db: Database, name: str, manifest: ExitsManifest) -> Generator[Row, None, Chosen]:
    """On held-out code: fast by a replay, and good where it runs."""
    held = CHOICE or next(str(entry["source"]) for entry in manifest.corpus if entry.get("held_out"))
    trace = traced(db, name, source_code(held, 2 * SWEEP), f"{name}: traced for the choice")
    replayed = replay_trace(trace, ReplaySpec(policies=every_policy(manifest)))
    write_replay_page(trace, replayed, FOLDER / f"exits-{name}-choice-replay.html")
    finalists = [one.spec for one in on_the_front(replayed)]
    best = _best(replayed, "controller")
    stopping = None if not manifest.controller else stopping_controller(trace, best)
    unread = [nobody_leaves(count) for count in PREVIEWS] if manifest.preview and manifest.controller else []
    live = [*(_foreseen(one, count) for one in finalists for count in PREVIEWS), *unread] if unread else finalists
    report = evaluated(name, [source_code(held, SWEEP)], live, f"{name}: choice on {held}", batch_size=16)
    write_page(report, FOLDER / f"exits-{name}-choice.html")
    benchmark, good = report.benchmarks[0], list[Asked]()
    for one in live:
        lost = _run(benchmark, one).summary.changed("rouge_l_relative")
        yield row(f"{name}, choice on {held}: {_label(one)}: ROUGE-L, relative change", lost, "")
        good += [one] if lost.value is not None and lost.value >= -LOSS else []
    speeds_of = dict[str, float]()
    if good:
        report = evaluated(name, [source_code(held, SAMPLES)], good, f"{name}: speeds on {held}")
        for one in good:
            summary = _run(report.benchmarks[0], one).summary
            speeds_of[_label(one)] = summary.speedup_ideal or 0
            ideal = summary.speedup_ideal or np.nan
            yield row(
                f"{name}, choice on {held}: {_label(one)}: speedup (ideal {ideal:.2f})", summary.speedup_token, "x"
            )
    good = [one for one in good if speeds_of[_label(one)] > 1]
    fastest = max(good, key=lambda one: speeds_of[_label(one)], default=None)
    return Chosen(
        fastest=fastest,
        controller=None if best is None else best.spec,
        stopping=None if stopping is None else stopping.spec,
        preview=max((one for one in unread if one in good), key=lambda one: speeds_of[_label(one)], default=None),
        lossless=lossless(name, manifest, held),
        controls=controls(_run(benchmark, fastest or live[0]), manifest),
    )


def nobody_leaves(preview: int) -> Asked:
    """All layers for every token; behind the last few logits are computed."""
    return {"confidence": {"threshold": 1.0, "ask_above": 1.0, "preview": preview}}


def _foreseen(asked: Asked, preview: int) -> Asked:
    [(kind, options)] = asked.items()
    return {kind: options | {"preview": preview}}


def on_the_front(replayed: ReplayReport) -> list[ReplayedPolicy]:
    """The fastest at each level of agreement, the safest first."""
    found: list[ReplayedPolicy] = []
    for level in LEVELS:
        able = [one for one in replayed.policies if _value(one, "agreement") >= level]
        best = max(able, key=lambda one: _value(one, "speedup_ideal"), default=None)
        found += [best] if best is not None and best not in found else []
    return found or [max(replayed.policies, key=lambda one: _value(one, "agreement"))]


def stopping_controller(trace: Trace, best: ReplayedPolicy | None) -> ReplayedPolicy | None:
    """The same controller with the highest stop threshold that still finds the wanted share of the hopeless."""
    if best is None:
        return None
    options = best.spec["controller"] | {"stop": {"from": 0.4, "to": 0.95, "steps": 23}}
    found = replay_trace(trace, ReplaySpec(policies=[{"controller": options}])).policies
    able = [one for one in found if _value(one, "stop_recall") >= RECALL]
    return able[-1] if able else found[0]


def lossless(name: str, manifest: ExitsManifest, held: str) -> Asked:
    """The exit point that drafts best, on a few samples: no replay can tell."""
    drafts: list[Asked] = [{"self-speculative": {"exit_layer": point}} for point in _points(manifest)[-3:]]
    few = source_code(held, max(6, SWEEP // 8))
    benchmark = evaluated(name, [few], drafts, f"{name}: drafts on {held}").benchmarks[0]
    return max(drafts, key=lambda one: _run(benchmark, one).summary.speedup_token.value or 0)


def _best(replayed: ReplayReport, kind: str) -> ReplayedPolicy | None:
    """The fastest of a kind that hardly ever parts from full depth."""
    able = [one for one in replayed.policies if one.kind == kind and _value(one, "agreement") >= LEVELS[2]]
    return max(able, key=lambda one: _value(one, "speedup_ideal"), default=None)


# --- a bundle --------------------------------------------------------------------------------------------------------


def evidence(name: str) -> Iterator[Row]:
    """All rows of a bundle, what the issue asks for first."""
    manifest = read_manifest(find_bundle(name))
    _check_unseen(manifest)
    yield loading(name)
    with closing(open_database(DATABASE)) as db:
        chosen = yield from choice(db, name, manifest)
        yield from judged(name, manifest, chosen)
        yield from more_quality(name, chosen)
        yield from stops(name, manifest)
        for benchmark in (source_code(SOURCE, SAMPLES), human_eval(SAMPLES)):
            yield from at_one_depth(db, name, manifest, chosen, benchmark)
    yield from speeds(name, [parse_policy(one) for one in (chosen.fastest, chosen.lossless) if one is not None])


def judged(name: str, manifest: ExitsManifest, chosen: Chosen) -> Iterator[Row]:
    """What was chosen elsewhere, at batch 1, beside its controls; and what its gain is made of."""
    benchmarks = [source_code(SOURCE, SAMPLES), human_eval(SAMPLES)]
    report = evaluated(name, benchmarks, chosen.policies, f"{name}: judged")
    write_page(report, FOLDER / f"exits-{name}.html")
    for benchmark in report.benchmarks:
        where = f"{name}, {_named(benchmark)}"
        yield from table(benchmark, chosen, where, 1.25 if manifest.tunes else 1.10)
        yield from frontier(benchmark, where)
    plain = unshortened(name, benchmarks[:1], chosen, manifest)
    if plain is not None and chosen.fastest is not None:
        speed = _run(report.benchmarks[0], chosen.fastest).summary.speedup_token
        without = _run(plain.benchmarks[0], _plain(chosen.fastest)).summary.speedup_token
        yield from split(speed, without, f"{name}, {_named(plain.benchmarks[0])}")


def table(benchmark: BenchmarkReport, chosen: Chosen, where: str, wanted: float) -> Iterator[Row]:
    """The issue's figures of speed."""
    if chosen.fastest is not None:
        speed = _run(benchmark, chosen.fastest).summary.speedup_token
        yield row(f"{where}: chosen for at most 1.1 % loss: speedup", speed, "x", at_least=wanted)
    if chosen.preview is not None:
        speed = _run(benchmark, chosen.preview).summary.speedup_token
        yield row(f"{where}: nothing but the preview behind the last layer: speedup", speed, "x")
    for what, one in (("controller without stops", chosen.controller), ("with stops", chosen.stopping)):
        if one is not None:
            s = _run(benchmark, one).summary
            yield row(f"{where}: {what}: speedup per token", s.speedup_token, "x")
            yield row(f"{where}: {what}: speedup per request", s.speedup_request, "x")
    s = _run(benchmark, chosen.lossless).summary
    yield row(f"{where}: without any loss, {_label(chosen.lossless)}: speedup", s.speedup_token, "x")
    yield row(f"{where}: its tokens equal to full depth's", s.metric("token_agreement"), "")


def frontier(benchmark: BenchmarkReport, where: str) -> Iterator[Row]:
    """Speed, quality and depth of everything that ran."""
    for run in benchmark.challengers:
        s = run.summary
        yield row(f"{where}: {run.policy}: speedup (ideal {s.speedup_ideal or np.nan:.2f})", s.speedup_token, "x")
        yield row(f"{where}: {run.policy}: ROUGE-L, relative change", s.changed("rouge_l_relative"), "")
        depth = Estimate(value=s.mean_exit_layer)
        yield row(f"{where}: {run.policy}: mean exit layer of {s.n_layers}", depth, "layers")


def more_quality(name: str, chosen: Chosen) -> Iterator[Row]:
    """ROUGE-L of the chosen one, and of full depth where the bundle tunes the model, on more samples."""
    benchmarks = [source_code(SOURCE, QUALITY), human_eval(QUALITY)]
    policies = [] if chosen.fastest is None else [chosen.fastest]
    report = evaluated(name, benchmarks, policies, f"{name}: quality", batch_size=16)
    write_page(report, FOLDER / f"exits-{name}-quality.html")
    for benchmark in report.benchmarks:
        where = f"{name}, {_named(benchmark)}"
        if chosen.fastest is not None:
            lost = _run(benchmark, chosen.fastest).summary.changed("rouge_l_relative")
            yield row(f"{where}: {_label(chosen.fastest)}: ROUGE-L, relative change", lost, "", at_least=-LOSS)
        if benchmark.original is not None and benchmark.baseline is not None:
            change = benchmark.baseline.summary.changed_from_original("rouge_l_relative")
            yield row(f"{where}: tuned at full depth against the original, ROUGE-L", change, "", at_least=-0.005)


def at_one_depth(db: Database, name: str, manifest: ExitsManifest, chosen: Chosen, benchmark: Asked) -> Iterator[Row]:
    """Replayed: of every kind the policy that goes as deep as the chosen one, and the oracle; and the stops."""
    trace = traced(db, name, benchmark, f"{name}: traced")
    by_chance = [one for one in chosen.controls if "random" in one]
    mine = [one for one in (chosen.fastest and _plain(chosen.fastest), *by_chance) if one is not None]
    stopping = [] if chosen.stopping is None else [chosen.stopping]
    asked = [*mine, *stopping, "oracle", *every_policy(manifest)]
    found = replay_trace(trace, ReplaySpec(policies=asked))
    page = trace.run.benchmark.split(" ")[0].replace(":", "-")
    write_replay_page(trace, found, FOLDER / f"exits-{name}-{page}-replay.html")
    where = f"{name}, {trace.run.benchmark}, replayed"
    depth = _value(next((one for one in found.policies if one.spec in mine), found.policies[0]), _DEPTH)
    able = [one for one in found.policies if one.spec != chosen.stopping]
    for kind in dict.fromkeys(one.kind for one in able):
        same = [one for one in able if one.kind == kind]
        one = min(same, key=lambda one: abs(_value(one, _DEPTH) - depth))
        told = f"exit layer {_value(one, _DEPTH):.1f}, ideal {_value(one, 'speedup_ideal'):.2f}"
        yield _replayed(f"{where}, at one depth: {one.policy} ({told}): tokens right", one, "tokens_right", "")
    for one in found.policies:
        if one.spec == chosen.stopping:
            for figure in ("stop_base_rate", "stop_precision", "stop_recall", "stop_lift"):
                yield _replayed(f"{where}: {one.policy}: {figure} of completions", one, figure, "")


def split(whole: Estimate, unshortened: Estimate, where: str) -> Iterator[Row]:
    """The gain with full heads, and its share of the gain: what is left comes from the shortlist."""
    yield row(f"{where}: the same without the shortlist: speedup", unshortened, "x")
    if whole.value is not None and unshortened.value is not None and whole.value > 1:
        share = Estimate(value=(unshortened.value - 1) / (whole.value - 1))
        yield row(f"{where}: share of the gain from leaving early", share, "")


def unshortened(name: str, benchmarks: list[Asked], chosen: Chosen, manifest: ExitsManifest) -> JobReport | None:
    """What was chosen for its speed, with heads over the whole vocabulary; None where they are that already."""
    if manifest.shortlist is None or manifest.head == "untied" or chosen.fastest is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        tensors = load_file(find_bundle(name) / TENSORS)
        del tensors["shortlist"]
        write_bundle(Path(folder) / "whole", manifest.model_copy(update={"shortlist": None, "preview": None}), tensors)
        return evaluated(f"{folder}/whole", benchmarks, [_plain(chosen.fastest)], f"{name}: without the shortlist")


def _plain(asked: Asked) -> Asked:
    """The same policy where all logits are computed behind the last layer."""
    [(kind, options)] = asked.items()
    return {kind: {key: value for key, value in options.items() if key != "preview"}}


# --- small things ----------------------------------------------------------------------------------------------------

_DEPTH = "mean_exit_layer"


def _points(manifest: ExitsManifest) -> list[int]:
    """The exit points before full depth."""
    return [point for point in manifest.exit_points if point < manifest.n_layers]


def _named(benchmark: BenchmarkReport) -> str:
    return f"{benchmark.name.split(' ')[0]}, {benchmark.samples} samples"


def _label(asked: Asked) -> str:
    return parse_policy(asked).label


def _run(benchmark: BenchmarkReport, asked: Asked) -> RunReport:
    return next(run for run in benchmark.runs if run.policy == _label(asked))


def _value(one: ReplayedPolicy, figure: str) -> float:
    found = one.figures[figure].value
    return -np.inf if found is None else found


def _replayed(name: str, one: ReplayedPolicy, figure: str, unit: str) -> Row:
    found = one.figures[figure]
    return row(name, Estimate(value=found.value, low=found.low, high=found.high), unit)


def _check_unseen(manifest: ExitsManifest) -> None:
    if SOURCE in {entry.get("source") for entry in manifest.corpus}:
        raise BadInput(f"BENCH_SOURCE: {SOURCE!r} is in the bundle's corpus; name a tree that no training saw.")


def everything(bundles: Sequence[str]) -> Iterator[Row]:
    """Every row of the table, in its order."""
    for name in bundles:
        yield from evidence(name)


def main() -> None:
    """Print the table and write it to build/bench/exits.json."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    write("exits", printed(everything(BUNDLES)))


if __name__ == "__main__":
    main()
