"""From a corpus to an exit bundle, the backbone frozen: cache states, train heads, train the controller, score, write.

Everything on the way lies in `<out>.work`: the same command goes on where it was interrupted, and removes the folder at
the end.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.engine import Engine
from engine.errors import BadInput
from engine.exits import MANIFEST, ExitsManifest, check_exit_points, write_bundle
from engine.heads import Heads
from engine.training.controller import train_controller
from engine.training.corpus import Entry, check_apart, read_corpus
from engine.training.heads import HeadTrainer, choose_shortlist
from engine.training.scores import held_out_scores
from engine.training.spec import TrainSpec
from engine.training.states import cache_states, places_of


@dataclass(frozen=True)
class Progress:
    """Where training stands."""

    stage: str
    done: int
    total: int
    unit: str
    loss: float | None = None


def train(spec: TrainSpec, out: Path, on_progress: Callable[[Progress], None] = lambda _: None) -> ExitsManifest:
    """Train the bundle of a spec into folder `out`. Raises `BadInput`; an interrupted call is gone on with."""
    check_apart(spec.corpus, spec.holdout)
    out = out.expanduser().absolute()
    work = out.with_name(out.name + ".work")
    _check_out(spec, out, work)
    engine = Engine(spec.model, device=spec.device, threads=spec.threads)
    check_exit_points(spec.exit_points, engine.n_layers)
    if spec.shortlist is not None and spec.shortlist > engine.facts.vocab_size:
        raise BadInput(
            f"shortlist is {spec.shortlist}, but the vocabulary of {spec.model!r} has {engine.facts.vocab_size}."
        )
    corpus = read_corpus(spec.corpus, spec.tokens, spec, engine.tokenizer)
    kept = read_corpus(spec.holdout, spec.holdout_tokens, spec, engine.tokenizer)
    _open_work(spec, out, work)

    def report(stage: str, unit: str) -> Callable[..., None]:
        return lambda done, total, loss=None: on_progress(Progress(stage, done, total, unit, loss))

    learned = cache_states(engine.stack, corpus.windows, spec.exit_points, work / "corpus", report("states", "tokens"))
    held = cache_states(
        engine.stack, kept.windows, spec.exit_points, work / "holdout", report("held-out states", "tokens")
    )

    tensors: dict[str, Tensor] = {}
    if spec.shortlist is not None:
        tensors["shortlist"] = choose_shortlist(learned, spec.shortlist, engine.stack.vocab_size).int()
    if spec.head != "tied":
        shortlist = tensors["shortlist"].long() if "shortlist" in tensors else None
        trainer = HeadTrainer(engine.stack, spec, learned, shortlist, work / "heads.pt")
        tensors |= trainer.train(report("heads", "steps"))
    manifest = _manifest(spec, engine, corpus.manifest, kept.manifest)
    with torch.inference_mode():
        heads = Heads(engine.stack, spec.head, spec.exit_points, tensors)
    if spec.controller is not None:
        tensors |= train_controller(
            heads, learned, places_of(corpus.windows), spec.controller, spec.seed, work,
            lambda stage: report(stage, {"predictions": "tokens"}.get(stage, "steps")),
        )  # fmt: skip
        with torch.inference_mode():
            heads = Heads(engine.stack, spec.head, spec.exit_points, tensors, spec.controller.kind)
    rule = spec.controller.labels if spec.controller else "sec"
    found = held_out_scores(heads, held, report("scores", "tokens"), places_of(kept.windows), rule)
    written = write_bundle(out, manifest.model_copy(update=found._asdict()), tensors)
    shutil.rmtree(work)
    return written


def _check_out(spec: TrainSpec, out: Path, work: Path) -> None:
    if (out / MANIFEST).exists():
        raise BadInput(f"out: {out} holds a bundle already; give another folder, or remove that one.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise BadInput(f"out: {out} is there and not empty; give a folder that does not exist yet.")
    note = work / "spec.json"
    if work.exists() and not note.exists():
        raise BadInput(f"out: {work}, where checkpoints would go, is not of our making; give another folder.")
    if note.exists() and note.read_text() != spec.model_dump_json():
        raise BadInput(f"out: {work} holds the checkpoint of another spec; give another folder, or remove that one.")


def _open_work(spec: TrainSpec, out: Path, work: Path) -> None:
    try:
        work.mkdir(parents=True, exist_ok=True)
        (work / "spec.json").write_text(spec.model_dump_json())
    except OSError as error:
        raise BadInput(f"out: {out} cannot be written ({error.strerror}); give another folder.") from None


def _manifest(spec: TrainSpec, engine: Engine, corpus: list[Entry], kept: list[Entry]) -> ExitsManifest:
    return ExitsManifest(
        model=spec.model,
        weights_hash=engine.weights_hash,
        n_layers=engine.n_layers,
        hidden_size=engine.stack.hidden_size,
        vocab_size=engine.stack.vocab_size,
        exit_points=spec.exit_points,
        head=spec.head,
        rank=spec.rank if spec.head == "lens" else None,
        shortlist=spec.shortlist,
        controller=spec.controller.kind if spec.controller else None,
        training=spec.model_dump(mode="json"),
        corpus=[*corpus, *({**entry, "held_out": True} for entry in kept)],
        tensors_hash="",
    )
