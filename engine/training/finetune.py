"""Fine-tuning on a language, as SEC does with GPT-2, for models that were not trained on code.

Gives a model folder, for which exits are trained afterwards as for any other model. Everything on the way lies in
`<out>.work`: the same command goes on where it was interrupted.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from engine.device import find_device
from engine.errors import BadInput
from engine.loading import load_model, load_tokenizer, resolve_model
from engine.training.checkpoint import Log
from engine.training.corpus import Window, read_corpora
from engine.training.sources import check_apart
from engine.training.spec import FineTuneSpec
from engine.training.trainer import Losses, Trainer
from engine.training.workplace import OnProgress, Workplace, reported

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HELD = 16  #: held-out windows that one look takes
NOTE = "finetuning.json"


class FineTuner(Trainer):
    """All weights of a model, next-token cross-entropy at every place."""

    def __init__(
        self,
        model: "PreTrainedModel",
        spec: FineTuneSpec,
        learned: list[Window],
        held: list[Window],
        work: Path,
        log: Log,
    ) -> None:
        self.model, self.spec, self.learned, self.held = model, spec, learned, held
        parameters = dict(model.requires_grad_(True).named_parameters())  # a tied matrix is there once
        rates = [(spec.learning_rate, parameters.values())]
        super().__init__("finetuning", parameters, rates, spec, spec.steps, spec.windows * spec.context, work, log)

    def losses_of_step(self) -> Losses:
        size = self.spec.windows
        per_epoch = max(1, len(self.learned) // size)
        epoch, at = divmod(self.step, per_epoch)
        order = np.random.default_rng([self.spec.seed, 2, epoch]).permutation(len(self.learned))
        return self._losses([self.learned[place] for place in order[at * size : (at + 1) * size]])

    def held_out(self) -> Losses:
        return Losses.mean([self._losses([window]) for window in self.held[:_HELD]])

    def score(self, losses: Losses) -> float:
        return losses.joint()

    def _losses(self, windows: list[Window]) -> Losses:
        ids = torch.tensor([window.token_ids for window in windows], device=self.model.device)
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        following = ids[:, 1:].flatten()
        loss: Tensor = F.cross_entropy(logits, following)
        if loss.requires_grad:
            loss.backward()
        right = (logits.detach().argmax(dim=-1) == following).double().mean().item()
        return Losses(full=loss.item(), right=right)


def finetune(
    spec: FineTuneSpec,
    out: Path,
    on_progress: OnProgress = lambda _: None,
    benchmarks: Iterable[tuple[str, str]] = (),
) -> Path:
    """Train a model's weights on a language; gives the folder of the new model. Raises `BadInput`."""
    check_apart(spec.corpus, spec.holdout)  # and not only once the model is converted
    place = Workplace(out, spec)
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    facts = resolve_model(spec.model)
    corpus, kept = read_corpora(spec, load_tokenizer(spec.model), benchmarks)
    place.open()
    model = load_model(facts).to(find_device(spec.device))
    tuner = FineTuner(model, spec, corpus.windows, kept.windows, place.work, place.log)
    tuner.run(reported(on_progress, "fine-tuning"))
    how = {
        "model": spec.model,
        "weights_hash": facts.weights_hash,
        "training": spec.model_dump(mode="json"),
        "corpus": [*corpus.manifest, *({**entry, "held_out": True} for entry in kept.manifest)],
    }
    _write(model, load_tokenizer(spec.model), how, place.out)
    shutil.rmtree(place.work)
    return place.out


def _write(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", how: dict[str, Any], out: Path) -> None:
    """A model folder, moved into place whole. Raises `BadInput` where the disk is full."""
    made = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))
    try:
        made.chmod(0o755)  # mkdtemp makes it the owner's alone
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / NOTE).write_text(json.dumps(how, indent=2) + "\n", encoding="utf-8")
        made.replace(out)  # absent or empty: nothing else is ever replaced
    except (OSError, SafetensorError) as error:
        raise BadInput(
            f"out: {out} cannot be written ({getattr(error, 'strerror', None) or error}); make room and run the "
            "command again, it goes on from the last checkpoint."
        ) from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
