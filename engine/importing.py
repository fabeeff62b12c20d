"""Checkpoints of other projects as exit bundles, by the names that they give their tensors.

`sec` (github.com/v587su/SEC; `save_pretrained` of its `…MultiLMHeadModelWithExit`):

| there | here |
|---|---|
| `inter_lm_head.<i>.weight` [vocabulary, hidden] | `heads.<point>.weight`; GPT-2: 1, 2, …; CodeGen: 1, 4, 7, … |
| `exit_classifier.weight` [3, hidden]: stop, exit, continue | `controller` [3, hidden]: continue, exit, stop |
| `transformer.*`, `lm_head.*` | the model's own: must equal it |

On GPT-2 the classifier is asked behind the last layer too, so `n_layers` is an exit point there.

`layerskip` (github.com/facebookresearch/LayerSkip, and models tuned like its own): a whole model under the names of
transformers, alone or as `model_state_dict` in what its `fine-tune.py` saves. Its exits have no heads of their own:
they become `tied` heads, and what was tuned becomes full-rank deltas against the model that tuning started from.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.controllers import SEC
from engine.deltas import PREFIX, tuned_weights_hash
from engine.errors import BadInput
from engine.exits import ExitsManifest, check_exit_points, write_bundle
from engine.loading import ModelFacts, load_model, resolve_model
from engine.policies import CONTINUE, EXIT, STOP

Form = Literal["sec", "layerskip"]
#: rows of SEC's classifier in the order of ours
_SEC_ROWS = {CONTINUE: 2, EXIT: 1, STOP: 0}
#: layers from one exit point of SEC's to the next, by the model's family
_SEC_INTERVAL = {"gpt2": 1, "codegen": 3}


def import_bundle(form: Form, checkpoint: Path, model: str, out: Path, points: tuple[int, ...] = ()) -> ExitsManifest:
    """Write a checkpoint as a bundle for a model into a new folder. Raises `BadInput`; nothing is written then.

    checkpoint: a file, or a folder that `save_pretrained` wrote. points: of `layerskip`; every layer but the last when
    absent. Pickles are read with `weights_only`: nothing in them is executed.
    """
    if out.exists():
        raise BadInput(f"out: {out} is there already; give a folder that does not exist yet.")
    facts = resolve_model(model)
    tensors = read_checkpoint(checkpoint)
    if form == "sec":
        found, made = _from_sec(checkpoint, tensors, facts)
    else:
        found, made = _from_layerskip(checkpoint, tensors, facts, points)
    manifest = ExitsManifest(
        model=facts.name,
        weights_hash=facts.weights_hash,
        n_layers=facts.n_layers,
        hidden_size=facts.hidden_size,
        vocab_size=facts.vocab_size,
        exit_points=found,
        head="untied" if form == "sec" else "tied",
        controller="sec" if form == "sec" else None,
        tuned_weights_hash=tuned_weights_hash(facts.weights_hash, made),
        training={"imported": form, "checkpoint": checkpoint.name},
        tensors_hash="",
    )
    return write_bundle(out, manifest, made)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by name. Raises `BadInput` where it is none."""
    files = sorted([*path.glob("*.safetensors"), *path.glob("*.bin")]) if path.is_dir() else [path]
    if not files:
        raise BadInput(f"checkpoint: {path} has neither *.safetensors nor *.bin; give the folder of a checkpoint.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read_file(file)
    return tensors


def _read_file(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # whatever a file that is none makes safetensors and torch raise
        reason = str(error).split("\n", 1)[0]
        raise BadInput(
            f"checkpoint: {file} cannot be read ({reason}); give safetensors, or a state dict that torch.save wrote."
        ) from None
    content = content.get("model_state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise BadInput(f"checkpoint: {file} holds no state dict; save the model's `state_dict()`.")
    return content


def _from_sec(
    checkpoint: Path, tensors: Mapping[str, Tensor], facts: ModelFacts
) -> tuple[tuple[int, ...], dict[str, Tensor]]:
    interval = _SEC_INTERVAL.get(facts.family)
    if interval is None:
        raise BadInput(f"model {facts.name!r}: SEC has GPT-2 and CodeGen, no {facts.family}; name one of those.")
    _check_backbone(checkpoint, tensors, facts)
    points = tuple(range(1, facts.n_layers, interval))
    shape = (facts.vocab_size, facts.hidden_size)
    made = {
        f"heads.{point}.weight": _taken(checkpoint, tensors, f"inter_lm_head.{place}.weight", shape)
        for place, point in enumerate(points)
    }
    classifier = _taken(checkpoint, tensors, "exit_classifier.weight", (3, facts.hidden_size))
    made[SEC] = classifier[[_SEC_ROWS[value] for value in (CONTINUE, EXIT, STOP)]].contiguous()
    return (*points, facts.n_layers) if facts.family == "gpt2" else points, made


def _taken(checkpoint: Path, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in tensors or tuple(tensors[name].shape) != shape:
        found = list(tensors[name].shape) if name in tensors else "missing"
        raise BadInput(
            f"checkpoint: tensor {name!r} of {checkpoint} is {found}, but this model needs {list(shape)}; "
            "name the model that it was trained on."
        )
    return tensors[name].float().clone()


def _check_backbone(checkpoint: Path, tensors: Mapping[str, Tensor], facts: ModelFacts) -> None:
    """SEC freezes the model, so a checkpoint's copy of it must be the model that the bundle is for."""
    own = load_model(facts).state_dict()
    for name, tensor in tensors.items():
        if name.startswith("transformer.") and name in own and not torch.equal(own[name].cpu(), tensor.float()):
            raise BadInput(
                f"checkpoint: {name!r} of {checkpoint} is not that of model {facts.name!r}; its heads serve the model "
                "that they were trained on: save that one with save_pretrained and name its folder."
            )


def _from_layerskip(
    checkpoint: Path, tensors: Mapping[str, Tensor], facts: ModelFacts, points: tuple[int, ...]
) -> tuple[tuple[int, ...], dict[str, Tensor]]:
    points = points or tuple(range(1, facts.n_layers))
    check_exit_points(points, facts.n_layers)
    made: dict[str, Tensor] = {}
    for name, parameter in load_model(facts).named_parameters():  # tied weights once, under their first name
        delta = _taken(checkpoint, tensors, name, tuple(parameter.shape)) - parameter.float().cpu()
        if delta.any():
            module, _, part = name.rpartition(".")
            made[f"{PREFIX}{module}.{'full' if part == 'weight' else part}"] = delta
    return points, made
