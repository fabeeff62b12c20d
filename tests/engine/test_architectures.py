"""Families: what third parties add works as documented, and no weight is held twice."""

import re
from pathlib import Path

import pytest
import torch
from documented import DOCUMENTS, installed
from test_parity import differences, generate, write
from tiny_models import open_engine, random_model, random_prompts, save

from engine.architectures import architectures, build_stack, check_family
from engine.errors import BadInput


def test_family_from_another_package(tmp_path: Path) -> None:
    """Protects the document: its example is a family that writes the tokens of `transformers`, window and all."""
    peer, prompts = random_model("mistral"), random_prompts(8, seed=11)
    folder = save(random_model("mistral"), tmp_path / "model")
    with installed("architectures.md", architectures, tmp_path):
        engine = open_engine(folder)
        with pytest.raises(BadInput, match="gpt_bigcode, llama, mistral, qwen2, qwen3, starcoder2; add"):
            check_family("bert")
    for batch_size in (8, 1):
        theirs = generate(peer, prompts, 14, batch_size)
        assert differences(peer, prompts, write(engine, prompts, 14, batch_size), theirs) == []


def test_family_that_nobody_has_described(tmp_path: Path) -> None:
    """Protects the sentence: which families there are, and how another is added."""
    folder = save(random_model("mistral"), tmp_path / "model")
    with pytest.raises(BadInput) as error:
        open_engine(folder)
    assert str(error.value) == (
        "model family 'mistral' is not known; known: codegen, gpt2, gpt_bigcode, llama, qwen2, qwen3, starcoder2; "
        "add one through the entry point group 'shortstop.architectures'."
    )


def test_document_lists_the_families() -> None:
    """Protects the document's table against a family that it forgets."""
    listed = re.findall(r"^\| (`.*?) \|", (DOCUMENTS / "architectures.md").read_text(), re.MULTILINE)
    named = {name for row in listed for name in re.findall(r"`(\w+)`", row)}
    assert set(architectures) <= named


FAMILIES = ["llama attention bias", "qwen3", "gpt2", "codegen", "gpt_bigcode every head its own keys", "starcoder2"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_joined_weights_are_held_once(kind: str) -> None:
    """Protects memory: a stack and the model that it came from together hold no more than the model did.

    The keys' and values' own part of a matrix is left out: `Matrix.outputs` copies it, for a reason.
    """
    model = random_model(kind).requires_grad_(False)
    before = _bytes(list(model.parameters()))
    with torch.inference_mode():
        stack = build_stack(model)
    matrices = [matrix for layer in range(stack.n_layers) for matrix in stack.matrices(layer)]
    after = _bytes([*model.parameters(), *(matrix.weight for matrix in matrices), stack.unembedding])
    print(f"{kind}: {before} bytes before, {after} after")
    assert after <= before


def _bytes(tensors: list[torch.Tensor]) -> int:
    """Memory of all tensors together, what they share counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
