"""From a corpus to an exit bundle: tune the backbone where asked, cache states, train heads and controller, score.

Everything on the way lies in `<out>.work`: the same command goes on where it was interrupted, and removes the folder at
the end.
"""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.architectures import build_stack, check_family
from engine.deltas import PREFIX, merge_deltas, tuned_weights_hash
from engine.device import find_device
from engine.errors import BadInput
from engine.exits import (
    TENSORS,
    ExitsManifest,
    check_exit_points,
    check_weights,
    find_bundle,
    read_manifest,
    write_bundle,
)
from engine.heads import Heads
from engine.loading import ModelFacts, load_model, load_tokenizer, resolve_model
from engine.preview import DOWN
from engine.stack import LayerStack
from engine.training.backbone import Backbone
from engine.training.checkpoint import Log, making
from engine.training.controller import train_controller
from engine.training.corpus import Corpus, Entry, read_corpora
from engine.training.heads import HeadTrainer
from engine.training.preview import find_preview
from engine.training.scores import held_out_scores
from engine.training.shortlist import choose_shortlist, coverage
from engine.training.sources import check_apart
from engine.training.spec import TrainSpec
from engine.training.states import cache_states, places_of
from engine.training.tuning import Tuner
from engine.training.workplace import OnProgress, Progress, Workplace, reported


def train(
    spec: TrainSpec,
    out: Path,
    on_progress: OnProgress = lambda _: None,
    benchmarks: Iterable[tuple[str, str]] = (),
) -> ExitsManifest:
    """Train the bundle of a spec into folder `out`. Raises `BadInput`; an interrupted call is gone on with.

    benchmarks: names and texts of what must not be learned, besides what is held out.
    """
    check_apart(spec.corpus, spec.holdout)  # and not only once the model is converted
    place = Workplace(out, spec)
    work, log = place.work, place.log
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    facts = resolve_model(spec.model)
    check_family(facts.family)
    check_exit_points(spec.exit_points, facts.n_layers)
    if spec.shortlist is not None and spec.shortlist > facts.vocab_size:
        raise BadInput(f"shortlist is {spec.shortlist}, but the vocabulary of {spec.model!r} has {facts.vocab_size}.")
    started = _start(spec, facts)
    corpus, kept = read_corpora(spec, load_tokenizer(spec.model), benchmarks)
    place.open()
    tensors = {name: tensor for name, tensor in started.items() if name.startswith(PREFIX)}
    if spec.shortlist is not None:
        tensors["shortlist"] = _shortlist(spec, started, corpus, facts)
    if spec.tuning is not None:
        tensors |= _tuned(spec, facts, tensors["shortlist"].long(), started, corpus, kept, work, log, on_progress)
        started = tensors
    with torch.no_grad():
        stack = _stack(spec, facts, tensors)
    points = spec.exit_points
    cached = corpus.windows[: None if spec.cached_tokens is None else spec.cached_tokens // spec.context]
    learned = cache_states(stack, cached, points, work / "corpus", _report(on_progress, "states"))
    held = cache_states(stack, kept.windows, points, work / "holdout", _report(on_progress, "held-out states"))
    if spec.head != "tied":
        shortlist = tensors["shortlist"].long() if "shortlist" in tensors else None
        trainer = HeadTrainer(stack, spec, learned, held, shortlist, started, work, log)
        tensors |= trainer.train(reported(on_progress, "heads"))
    with torch.inference_mode():
        heads = Heads(stack, spec.head, spec.exit_points, tensors)
    if spec.controller is not None:
        tensors |= train_controller(
            heads, learned, places_of(cached), spec.controller, spec.seed, work,
            lambda stage: _report(on_progress, stage, {"predictions": "tokens"}.get(stage, "steps")),
        )  # fmt: skip
        with torch.inference_mode():
            heads = Heads(stack, spec.head, spec.exit_points, tensors, spec.controller.kind)
    if spec.preview is not None:
        tensors |= find_preview(stack, learned, spec.preview)
        with torch.inference_mode():
            heads = Heads(
                stack, spec.head, spec.exit_points, tensors, spec.controller.kind if spec.controller else None
            )
    rule = spec.controller.labels if spec.controller else "sec"
    found = held_out_scores(heads, held, _report(on_progress, "scores"), places_of(kept.windows), rule)
    if "shortlist" in tensors:
        found.scores["full"]["shortlist_coverage"] = coverage(
            tensors["shortlist"].long(), kept.windows, facts.vocab_size
        )
    manifest = _manifest(spec, facts, corpus.manifest, kept.manifest, tensors)
    written = write_bundle(place.out, manifest.model_copy(update=found._asdict()), tensors)
    shutil.rmtree(work)
    return written


def _start(spec: TrainSpec, facts: ModelFacts) -> dict[str, Tensor]:
    """Tensors of the bundle that training goes on from. Raises `BadInput` where it does not fit."""
    if spec.start is None:
        return {}
    folder = find_bundle(spec.start)
    manifest = read_manifest(folder)
    check_weights(manifest, facts)
    if manifest.head != spec.head or (spec.head == "lens" and manifest.rank != spec.rank):
        raise BadInput(
            f"start: {spec.start!r} has heads {manifest.head!r} of rank {manifest.rank}, the spec wants {spec.head!r} "
            f"of rank {spec.rank}; make them the same."
        )
    tensors = load_file(folder / TENSORS)
    _check_sizes(spec, manifest, tensors)
    return tensors


def _check_sizes(spec: TrainSpec, manifest: ExitsManifest, tensors: dict[str, Tensor]) -> None:
    """Whether what a start has fits into what is to be trained. Raises `BadInput`."""
    if spec.head == "untied" and manifest.shortlist != spec.shortlist:
        raise BadInput(
            f"start: {spec.start!r} has untied heads over a shortlist of {manifest.shortlist}, the spec wants "
            f"{spec.shortlist}; make them the same."
        )
    ranks = [len(tensor) for name, tensor in tensors.items() if name.startswith(PREFIX) and name.endswith(".a")]
    if spec.tuning is not None and max(ranks, default=0) > spec.tuning.rank:
        raise BadInput(
            f"tuning.rank is {spec.tuning.rank}, but the deltas of {spec.start!r} have rank {max(ranks)}; give that at "
            "least."
        )


def _shortlist(spec: TrainSpec, started: dict[str, Tensor], corpus: Corpus, facts: ModelFacts) -> Tensor:
    """The shortlist that training goes on with, or the most frequent tokens of the corpus."""
    if "shortlist" in started and len(started["shortlist"]) == spec.shortlist:
        return started["shortlist"]
    assert spec.shortlist is not None
    return choose_shortlist(corpus.windows, spec.shortlist, facts.vocab_size).int()


def _tuned(
    spec: TrainSpec,
    facts: ModelFacts,
    shortlist: Tensor,
    started: dict[str, Tensor],
    corpus: Corpus,
    kept: Corpus,
    work: Path,
    log: Log,
    on_progress: OnProgress,
) -> dict[str, Tensor]:
    """Deltas and lenses of a tuned backbone; kept in `work` once they are there."""
    done = work / "tuned.safetensors"
    if done.exists():
        return load_file(done)
    assert spec.tuning is not None
    deltas = {name: tensor for name, tensor in started.items() if name.startswith(PREFIX)}
    generator = torch.Generator().manual_seed(spec.seed)
    model = load_model(facts).to(find_device(spec.device))
    backbone = Backbone(model, spec.tuning.rank, generator, deltas or None)
    tuner = Tuner(backbone, spec, shortlist, started, corpus.windows, kept.windows, work, log)

    tensors = tuner.train(reported(on_progress, "tuning"))
    with making(done) as part:
        save_file(tensors, part)
    return tensors


def _stack(spec: TrainSpec, facts: ModelFacts, tensors: dict[str, Tensor]) -> LayerStack:
    """The layers that states come from: the model as it is, or with its deltas."""
    model = load_model(facts).to(find_device(spec.device))
    deltas = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    merge_deltas(model, deltas)
    return build_stack(model)


def _report(on_progress: OnProgress, stage: str, unit: str = "tokens") -> Callable[..., None]:
    return lambda done, total, loss=None: on_progress(Progress(stage, done, total, unit, loss))


def _manifest(
    spec: TrainSpec,
    facts: ModelFacts,
    corpus: list[Entry],
    kept: list[Entry],
    tensors: dict[str, Tensor],
) -> ExitsManifest:
    return ExitsManifest(
        model=spec.model,
        weights_hash=facts.weights_hash,
        n_layers=facts.n_layers,
        hidden_size=facts.hidden_size,
        vocab_size=facts.vocab_size,
        exit_points=spec.exit_points,
        head=spec.head,
        rank=spec.rank if spec.head == "lens" else None,
        shortlist=spec.shortlist,
        controller=spec.controller.kind if spec.controller else None,
        preview=len(tensors[DOWN]) if DOWN in tensors else None,
        training=spec.model_dump(mode="json"),
        corpus=[*corpus, *({**entry, "held_out": True} for entry in kept)],
        tuned_weights_hash=tuned_weights_hash(facts.weights_hash, tensors),
        tensors_hash="",
    )
