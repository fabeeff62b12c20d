"""Checkpoints of SEC and LayerSkip become bundles that do what they did there."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, N_LAYERS, VOCABULARY, open_engine, own_cache, random_model, random_prompts, save
from transformers import AutoModelForCausalLM

from engine.errors import BadInput
from engine.exits import TENSORS
from engine.importing import import_bundle
from engine.spec import policy


def sec_checkpoint(model: Path, points: int) -> dict[str, torch.Tensor]:
    """As `save_pretrained` of SEC's classes writes it: the frozen model, its heads, its classifier."""
    torch.manual_seed(9)
    tensors = dict(AutoModelForCausalLM.from_pretrained(model).state_dict())
    for place in range(points):
        tensors[f"inter_lm_head.{place}.weight"] = torch.randn(VOCABULARY, HIDDEN)
    tensors["exit_classifier.weight"] = torch.randn(3, HIDDEN)
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize(("family", "points"), [("gpt2", (1, 2, 3, 4, 5, 6)), ("codegen", (1, 4))])
@pytest.mark.parametrize("form", ["pytorch_model.bin", "model.safetensors"])
def test_sec(
    tiny_folder: Callable[[str], Path], tmp_path: Path, family: str, points: tuple[int, ...], form: str
) -> None:
    """Heads at SEC's layers; the classifier's rows are stop, exit, continue there, and continue, exit, stop here."""
    model, checkpoint = tiny_folder(family), tmp_path / "theirs"
    checkpoint.mkdir()
    before_last = [point for point in points if point < N_LAYERS]
    tensors = sec_checkpoint(model, len(before_last))
    (torch.save if form.endswith("bin") else save_file)(tensors, checkpoint / form)
    with own_cache(model / "cache"):
        manifest = import_bundle("sec", checkpoint, str(model), tmp_path / "out")
    assert (manifest.exit_points, manifest.head, manifest.controller) == (points, "untied", "sec")
    made = load_file(tmp_path / "out" / TENSORS)
    for place, point in enumerate(before_last):
        assert torch.equal(made[f"heads.{point}.weight"], tensors[f"inter_lm_head.{place}.weight"])
    stop, leave, go = tensors["exit_classifier.weight"]
    assert torch.equal(made["controller"], torch.stack([go, leave, stop]))
    engine = open_engine(model, tmp_path / "out")
    states = torch.randn(4, HIDDEN)
    theirs = (states @ tensors["exit_classifier.weight"].T).softmax(dim=-1)
    torch.testing.assert_close(engine.heads.judge(points[0], states), theirs.flip(1))


@pytest.mark.parametrize("form", ["checkpoint_500.pt", "model.safetensors"])
def test_layerskip(tiny_folder: Callable[[str], Path], tmp_path: Path, form: str) -> None:
    """What was tuned is a second reference, and the tuned model writes what the checkpoint itself writes."""
    model = tiny_folder("llama")
    tuned = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "layers.2" in name or "embed_tokens" in name:
                weight += torch.randn_like(weight) * 0.1
    state = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    checkpoint = tmp_path / form
    if form.endswith("pt"):
        torch.save({"step": 500, "epoch": 0, "model_state_dict": state, "optimizer_state_dict": {}}, checkpoint)
    else:
        save_file(state, checkpoint)
    with own_cache(model / "cache"):
        manifest = import_bundle("layerskip", checkpoint, str(model), tmp_path / "out", (2, 4))
    assert (manifest.exit_points, manifest.head, manifest.controller, manifest.tunes) == ((2, 4), "tied", None, True)
    names = set(load_file(tmp_path / "out" / TENSORS))
    assert all("layers.2" in name or "embed_tokens" in name for name in names)

    ours, theirs = open_engine(model, tmp_path / "out"), open_engine(save(tuned, tmp_path / "whole"), "tied")
    for spec in (policy("full"), policy("fixed", exit_layer=4)):
        texts = []
        for engine in (ours, theirs):
            start = engine.prefill(random_prompts(3), 8)
            done = engine.decode(start, spec, max_new_tokens=8, ends_with_line=False).completions
            texts.append([completion.token_ids for completion in done])
        assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("form", "family", "change", "says"),
    [
        ("sec", "gpt2", {"exit_classifier.weight": None}, "'exit_classifier.weight' of .* is missing"),
        ("sec", "gpt2", {"inter_lm_head.1.weight": torch.ones(3, 3)}, r"is \[3, 3\], but this model needs \[264, 48\]"),
        ("sec", "gpt2", {"transformer.wpe.weight": torch.ones(96, 48)}, "is not that of model"),
        ("sec", "llama", {}, "SEC has GPT-2 and CodeGen, no llama"),
        ("layerskip", "llama", {"model.norm.weight": None}, "'model.norm.weight' of .* is missing"),
    ],
)
def test_what_does_not_fit_is_refused(
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
    form: str,
    family: str,
    change: dict[str, torch.Tensor | None],
    says: str,
) -> None:
    model = tiny_folder(family)
    tensors = {name: tensor for name, tensor in (sec_checkpoint(model, 5) | change).items() if tensor is not None}
    torch.save(tensors, tmp_path / "theirs.bin")
    with own_cache(model / "cache"), pytest.raises(BadInput, match=says):
        import_bundle(form, tmp_path / "theirs.bin", str(model), tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_pickle_that_runs_code_is_refused(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "exploded",)

    torch.save({"model_state_dict": Bomb()}, tmp_path / "evil.pt")
    with own_cache(tmp_path / "cache"), pytest.raises(BadInput, match="cannot be read"):
        import_bundle("layerskip", tmp_path / "evil.pt", str(tiny_folder("llama")), tmp_path / "out")
    assert not (tmp_path / "exploded").exists()


def test_a_folder_that_is_there_is_not_written_to(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is there already"):
        import_bundle("layerskip", tmp_path / "none", str(tiny_folder("llama")), tmp_path)


def test_an_empty_folder_is_no_checkpoint(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with own_cache(tmp_path / "cache"), pytest.raises(BadInput, match=r"has neither \*\.safetensors nor \*\.bin"):
        import_bundle("sec", tmp_path / "empty", str(tiny_folder("gpt2")), tmp_path / "out")


def test_what_was_not_tuned_leaves_no_delta(tmp_path: Path) -> None:
    model = save(random_model("llama"), tmp_path / "model")
    with own_cache(tmp_path / "cache"):
        manifest = import_bundle("layerskip", model, str(model), tmp_path / "out")
    assert not manifest.tunes
    assert manifest.exit_points == tuple(range(1, N_LAYERS))
    assert load_file(tmp_path / "out" / TENSORS) == {}
