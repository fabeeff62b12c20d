"""Whether a bundle is what it says it is: every check that can be made of it without a run."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.deltas import PREFIX, check_deltas
from engine.errors import BadInput
from engine.exits import TENSORS, ExitsManifest, check_weights, read_manifest
from engine.heads import check_tensors
from engine.loading import resolve_model


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    what: str
    holds: bool
    says: str


def inspect(folder: Path, model: str | None = None) -> Iterator[Check]:
    """Look at a bundle: its files, its tensors, its deltas, the model that it serves; each check once, in this order.

    model: the one to hold it against; by default the one that the bundle names, where that can be found here. What
    cannot be looked at because of a fault before it is left out.
    """
    started = time.monotonic()
    try:
        manifest, tensors = read_manifest(folder), load_file(folder / TENSORS)
    except (BadInput, OSError, ValueError) as error:
        yield Check("files", False, str(error))
        return
    seconds, size = time.monotonic() - started, (folder / TENSORS).stat().st_size
    yield Check("files", True, f"{size / 1e6:.1f} MB, whole, read in {seconds:.2f} s")
    yield _tensors(folder, manifest, tensors)
    yield _finite(tensors)
    if manifest.shortlist:
        yield _shortlist(manifest, tensors)
    yield _deltas(manifest, tensors)
    yield _model(manifest, model)


def _tensors(folder: Path, manifest: ExitsManifest, tensors: dict[str, Tensor]) -> Check:
    try:
        check_tensors(folder, manifest, tensors)
    except BadInput as error:
        return Check("tensors", False, str(error))
    points = ", ".join(map(str, manifest.exit_points))
    return Check("tensors", True, f"{len(tensors)}, as promised: {manifest.head} heads after layers {points}")


def _finite(tensors: dict[str, Tensor]) -> Check:
    wrong = sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all())
    if wrong:
        return Check("numbers", False, f"{', '.join(wrong)} {'has' if len(wrong) == 1 else 'have'} NaN or infinity")
    return Check("numbers", True, "all finite")


def _shortlist(manifest: ExitsManifest, tensors: dict[str, Tensor]) -> Check:
    ids = tensors.get("shortlist", torch.empty(0)).long()
    rises = bool((ids[1:] > ids[:-1]).all())
    inside = len(ids) > 0 and int(ids.min()) >= 0 and int(ids.max()) < manifest.vocab_size
    if not (rises and inside):
        return Check(
            "shortlist", False, f"its ids must rise, each once, within the vocabulary of {manifest.vocab_size}"
        )
    return Check("shortlist", True, f"{len(ids)} of {manifest.vocab_size} tokens")


def _deltas(manifest: ExitsManifest, tensors: dict[str, Tensor]) -> Check:
    try:
        check_deltas(manifest, tensors)
    except BadInput as error:
        return Check("deltas", False, str(error))
    if not manifest.tunes:
        return Check("deltas", True, "none: the model stays as it came")
    count = len({name.rpartition(".")[0] for name in tensors if name.startswith(PREFIX)})
    return Check("deltas", True, f"of {count} matrices; tuned weights {str(manifest.tuned_weights_hash)[:12]}…")


def _model(manifest: ExitsManifest, model: str | None) -> Check:
    try:
        facts = resolve_model(model or manifest.model)
    except BadInput as error:
        if model is not None:
            raise
        return Check("model", True, f"not looked at: {manifest.model!r} is not here ({error})")
    try:
        check_weights(manifest, facts)
    except BadInput as error:
        return Check("model", False, str(error))
    return Check("model", True, f"{facts.name!r} has the weights {facts.weights_hash[:12]}… that it was trained on")
