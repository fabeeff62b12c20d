"""Parts of `make bench-exits` that need no job: a bundle's speed by batch and context, its stops, how it loads."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.reports.model import Estimate
from engine.deltas import merge_deltas, read_deltas
from engine.engine import Engine
from engine.exits import ExitsManifest, find_bundle
from engine.heads import Heads
from engine.loading import load_model
from engine.policies import STOP
from engine.record import Decoded
from engine.spec import PolicySpec, parse_policy
from engine.text import Prompt
from engine.training.corpus import Window
from engine.training.labels import labels, left_before, predictions
from engine.training.scores import auroc, lift
from engine.training.sources import source_folder
from engine.training.spec import Labels
from engine.training.states import cache_states, places_of
from tests.bench.measure import Row, seconds, summarise

SOURCE = os.environ.get("BENCH_SOURCE", "torch")
#: batches behind a speed at batch 1; of larger ones fewer, for their prefill takes as many times longer
ROUNDS = int(os.environ.get("BENCH_ROUNDS", 4))
MODEL, THREADS, NEW, SEED = "smollm2-135m", 2, 16, 8
FULL = parse_policy("full")
BATCHES, CONTEXTS = (1, 4, 16), (128, 1024)


def row(name: str, found: Estimate, unit: str, at_least: float | None = None) -> Row:
    """An estimate as a row; an end that is not known is nan."""
    value, low, high = (np.nan if one is None else one for one in (found.value, found.low, found.high))
    return Row(name, value, low, high, unit, at_least=at_least)


# --- speed of batches ------------------------------------------------------------------------------------------------


def speeds(name: str, policies: Sequence[PolicySpec]) -> Iterator[Row]:
    """Speedup per token, by batch and context: the median over batches, each of other files."""
    engine = Engine(MODEL, name, threads=THREADS)
    engine.warm_up(policies)
    for context in CONTEXTS:
        for size in BATCHES:
            rounds = [_round(engine, batch, policies) for batch in batches(engine, context, size)]
            for spec in policies:
                found = [_per_token(done[FULL]) / _per_token(done[spec]) for done in rounds]
                ideal = sum(done[FULL].ideal_ns for done in rounds) / sum(done[spec].ideal_ns for done in rounds)
                label = f"{name}: {spec.label}, batch {size}, context {context}: speedup (ideal {ideal:.2f})"
                yield summarise(label, found, "x")


def _per_token(done: Decoded) -> float:
    return done.decode_ns / done.decode_tokens


def _round(engine: Engine, batch: list[Prompt], specs: Sequence[PolicySpec]) -> dict[PolicySpec, Decoded]:
    """One batch under full depth and all specs, each from the same prefill."""
    start = engine.prefill(batch, NEW)
    return {spec: engine.decode(start, spec, max_new_tokens=NEW, ends_with_line=False) for spec in (FULL, *specs)}


def batches(engine: Engine, context: int, size: int) -> Iterator[list[Prompt]]:
    """Prompts of one length out of the source tree, a file each."""
    texts = iter(_texts())
    for _ in range(ROUNDS if size == 1 else max(2, ROUNDS // size)):
        batch: list[Prompt] = []
        while len(batch) < size:
            ids = engine.tokenizer(next(texts))["input_ids"]
            batch += [Prompt(ids[:context])] if len(ids) >= context else []
        yield batch


@cache
def _texts() -> list[str]:
    """Files of the source tree, none of them short, in an order that a seed fixes."""
    files = sorted(source_folder(SOURCE).rglob("*.py"))
    order = np.random.default_rng(SEED).permutation(len(files))
    return [files[place].read_text("utf-8", errors="ignore") for place in order if files[place].stat().st_size > 6_000]


# --- stops -----------------------------------------------------------------------------------------------------------


def stops(name: str, manifest: ExitsManifest, windows: int = 120, length: int = 128) -> Iterator[Row]:
    """How well the controller knows, teacher-forced, what it was trained to give up; intervals over files."""
    if not manifest.controller:
        return
    engine = Engine(MODEL, name, threads=THREADS)
    cut = [
        Window(engine.tokenizer(text[:4_000])["input_ids"][:length], SOURCE, str(place))
        for place, text in enumerate(_texts()[:windows])
    ]
    cut = [window for window in cut if len(window.token_ids) == length]
    with tempfile.TemporaryDirectory() as folder:
        states = cache_states(engine.stack, cut, manifest.exit_points, Path(folder), lambda done, total: None)
        tokens, _ = predictions(engine.heads, states, lambda done, total: None)
        label = labels(tokens, states, _rule(manifest))
        left = left_before(label, places_of(cut))
        place = np.repeat(np.arange(len(cut)), places_of(cut))
        for depth, point in enumerate(manifest.exit_points):
            hidden = torch.from_numpy(np.array(states.hidden[:, depth])).to(engine.stack.unembedding)
            with torch.inference_mode():
                judged = engine.heads.judge(point, hidden, left.to(hidden.device))[:, STOP].cpu()
            so = label[:, depth] == STOP
            where = f"{name}, {SOURCE}, {len(cut)} files: stop at exit point {point}"
            yield _over_files(f"{where}: base rate", judged, so, place, lambda s, o: float(o.double().mean()), None)
            yield _over_files(f"{where}: AUROC", judged, so, place, auroc, 0.75)
            yield _over_files(f"{where}: lift at recall 0.3", judged, so, place, lambda s, o: lift(s, o, 0.3), 2.0)


def _rule(manifest: ExitsManifest) -> Labels:
    """By which its controller was trained; the first bundles knew the paper's only, and say no more than `true`."""
    asked = manifest.training.get("controller")
    return asked.get("labels", "sec") if isinstance(asked, dict) else "sec"


def _over_files(name: str, score: Any, so: Any, place: np.ndarray, figure: Any, at_least: float | None) -> Row:
    """The figure, and its interval by drawing files anew."""
    draw, members = np.random.default_rng(SEED), [np.flatnonzero(place == one) for one in range(place.max() + 1)]
    drawn = [np.concatenate([members[one] for one in draw.integers(0, len(members), len(members))]) for _ in range(200)]
    values = [figure(score[chosen], so[chosen]) for chosen in drawn]
    low, high = np.percentile(values, [2.5, 97.5])
    return Row(name, figure(score, so), float(low), float(high), "", at_least=at_least)


# --- loading ---------------------------------------------------------------------------------------------------------


def loading(name: str) -> Row:
    """What a bundle adds to the time that a model takes to load: its files read and held against their hashes, its
    deltas merged, its heads made.
    """
    engine, folder = Engine(MODEL, threads=THREADS), find_bundle(name)

    def load() -> None:
        Heads.load(engine.stack, folder)
        merge_deltas(model, read_deltas(folder))

    with torch.inference_mode():
        model = load_model(engine.facts)
        return summarise(f"{name}: loading", [seconds(load) for _ in range(5)], "s", at_most=1.0)
