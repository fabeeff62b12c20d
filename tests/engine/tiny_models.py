"""Small models with random weights, and exit bundles with random heads, on disk as a user would have them."""

import copy
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CodeGenConfig,
    GPT2Config,
    GPTBigCodeConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)
from transformers.utils import logging

from engine.controllers import promised
from engine.cost import Machine
from engine.engine import Engine, Prompt
from engine.exits import MANIFEST, TENSORS
from engine.loading import ModelFacts, resolve_model
from engine.spec import ControllerKind

N_LAYERS = 6
HIDDEN = 48
#: of a preview
RANK = 24
VOCABULARY = 264  # the tokenizer's 259 tokens, and some rows that no text uses, as many models have
CONTEXT = 96
EOS = 0
#: an exit point after the last layer included: the controller may stop there
POINTS = (1, 2, 4, 5, 6)
MACHINE = Machine(bandwidth=20e9, peak=150e9)

_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 80,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
#: what Qwen and StarCoder2 have that Llama has not
_WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_layer": N_LAYERS,
    "n_head": 6,
    "n_positions": CONTEXT,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}

_YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 24}
_CODEGEN = _GPT2 | {"n_head": 4, "rotary_dim": 6}


def _llama_rope(**rope: object) -> LlamaConfig:
    return LlamaConfig(**_LLAMA | {"rope_parameters": {"rope_theta": 10000.0} | rope})


CONFIGS = {
    "llama": LlamaConfig(**_LLAMA),
    "llama untied": LlamaConfig(**_LLAMA | {"tie_word_embeddings": False}),
    "llama every head its own keys": LlamaConfig(**_LLAMA | {"num_key_value_heads": 6}),
    "llama one key head": LlamaConfig(**_LLAMA | {"num_key_value_heads": 1}),
    "llama wide heads": LlamaConfig(**_LLAMA | {"head_dim": 16}),
    "llama attention bias": LlamaConfig(**_LLAMA | {"attention_bias": True}),
    "llama mlp bias": LlamaConfig(**_LLAMA | {"mlp_bias": True, "hidden_act": "gelu"}),
    "llama every bias": LlamaConfig(**_LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama rope theta": _llama_rope(rope_type="default", rope_theta=500.0),
    "llama rope linear": _llama_rope(rope_type="linear", factor=3.0),
    "llama rope llama3": _llama_rope(**_LLAMA3_ROPE),
    "llama rope yarn": _llama_rope(**_YARN_ROPE),
    "llama rope yarn attention factor": _llama_rope(**_YARN_ROPE, attention_factor=0.8, beta_fast=8.0),
    "llama rope dynamic": _llama_rope(rope_type="dynamic", factor=4.0),
    "llama norm epsilon": LlamaConfig(**_LLAMA | {"rms_norm_eps": 0.3}),
    "gpt2": GPT2Config(**_GPT2),
    "gpt2 untied": GPT2Config(**_GPT2 | {"tie_word_embeddings": False}),
    "gpt2 scaled by layer": GPT2Config(**_GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2 unscaled": GPT2Config(**_GPT2 | {"scale_attn_weights": False}),
    "gpt2 upcast": GPT2Config(**_GPT2 | {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True}),
    "gpt2 narrow mlp": GPT2Config(**_GPT2 | {"n_inner": 40, "activation_function": "relu"}),
    "qwen2": Qwen2Config(**_LLAMA),
    "qwen2 untied": Qwen2Config(**_LLAMA | {"tie_word_embeddings": False}),
    "qwen2 window in the upper layers": Qwen2Config(**_LLAMA | _WINDOW),
    "qwen2 window in every other layer": Qwen2Config(
        **_LLAMA | _WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * (N_LAYERS // 2)}
    ),
    "qwen2 window not used": Qwen2Config(**_LLAMA | _WINDOW | {"use_sliding_window": False}),
    "qwen2 rope yarn": Qwen2Config(**_LLAMA | {"rope_parameters": _YARN_ROPE}),
    "qwen3": Qwen3Config(**_LLAMA | {"head_dim": 16}),
    "qwen3 attention bias": Qwen3Config(**_LLAMA | {"head_dim": 8, "attention_bias": True}),
    "qwen3 one key head": Qwen3Config(**_LLAMA | {"head_dim": 8, "num_key_value_heads": 1}),
    "qwen3 untied, with a window": Qwen3Config(**_LLAMA | _WINDOW | {"head_dim": 16, "tie_word_embeddings": False}),
    "codegen": CodeGenConfig(**_CODEGEN),
    "codegen tied": CodeGenConfig(**_CODEGEN | {"tie_word_embeddings": True}),
    "codegen all of a head turns": CodeGenConfig(**_CODEGEN | {"rotary_dim": 12}),
    "codegen two heads a core": CodeGenConfig(**_CODEGEN | {"n_head": 8, "rotary_dim": 4}),
    "codegen narrow mlp": CodeGenConfig(**_CODEGEN | {"n_inner": 40, "activation_function": "relu"}),
    "gpt_bigcode": GPTBigCodeConfig(**_GPT2),
    "gpt_bigcode every head its own keys": GPTBigCodeConfig(**_GPT2 | {"multi_query": False}),
    "gpt_bigcode unscaled": GPTBigCodeConfig(**_GPT2 | {"scale_attn_weights": False}),
    "gpt_bigcode untied": GPTBigCodeConfig(**_GPT2 | {"tie_word_embeddings": False, "n_inner": 40}),
    "starcoder2": Starcoder2Config(**_LLAMA),
    "starcoder2 window": Starcoder2Config(**_LLAMA | {"sliding_window": 7}),
    "starcoder2 no bias": Starcoder2Config(**_LLAMA | {"use_bias": False, "hidden_act": "relu"}),
    "starcoder2 untied": Starcoder2Config(**_LLAMA | {"tie_word_embeddings": False, "norm_epsilon": 0.3}),
    "starcoder2 every head its own keys": Starcoder2Config(**_LLAMA | {"num_key_value_heads": 6}),
    "starcoder2 rope linear": Starcoder2Config(
        **_LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}}
    ),
}
#: families that are not built in
OTHERS = {"mistral": MistralConfig(**_LLAMA | {"sliding_window": 7})}


def random_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """A model of one of `CONFIGS`; biases and norms are random too, so that none can be forgotten unseen."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind] if kind in CONFIGS else OTHERS[kind]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.1)
            elif weight.dim() == 1:
                weight.normal_(1, 0.1)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, `<|end|>`, and two tokens with a newline inside."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|end|>", *letters, ";Ċ", ")Ċ"]
    raw = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [(";", "Ċ"), (")", "Ċ")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>")


def save(model: PreTrainedModel, folder: Path) -> Path:
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """What the engine notes about these models belongs in a temporary folder, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHORTSTOP_CACHE", str(folder))
        yield


def open_engine(model: Path, exits: Path | str | None = None, **options: Any) -> Engine:
    with own_cache(model / "cache"):
        engine = Engine(str(model), exits, device="cpu", **options)
    engine.machine = MACHINE
    return engine


def facts_of(model: Path) -> ModelFacts:
    with own_cache(model / "cache"):
        return resolve_model(str(model))


def make_bundle(
    folder: Path,
    facts: ModelFacts,
    *,
    head: str = "tied",
    points: tuple[int, ...] = POINTS,
    shortlist: int | None = None,
    controller: bool | ControllerKind = True,
    preview: bool = True,
    seed: int = 0,
) -> Path:
    """Write an exit bundle with random heads whose confidences and verdicts differ from token to token."""
    torch.manual_seed(seed)
    tensors = _random_heads(facts, head, points, shortlist)
    if controller == "calibrated":
        shapes = promised("calibrated", points, facts.hidden_size)
        tensors |= {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    elif controller:
        tensors["controller"] = torch.randn(3, facts.hidden_size) * 0.12
    # A projection on most of a state: what it overlooks is now and then the likeliest.
    axes = torch.linalg.qr(torch.randn(facts.hidden_size, RANK)).Q
    if preview:
        tensors |= {"preview.down": axes.t().contiguous(), "preview.up": axes.contiguous()}
    return write_bundle(
        folder, facts, tensors, head=head, exit_points=points, shortlist=shortlist, controller=controller,
        preview=RANK if preview else None,
    )  # fmt: skip


def _random_heads(
    facts: ModelFacts, head: str, points: tuple[int, ...], shortlist: int | None
) -> dict[str, torch.Tensor]:
    tensors = {}
    if shortlist:
        tensors["shortlist"] = torch.randperm(facts.vocab_size)[:shortlist].sort().values
    for point in points:
        if point < facts.n_layers and head == "lens":
            tensors[f"heads.{point}.down"] = torch.randn(4, facts.hidden_size) * 0.2
            tensors[f"heads.{point}.up"] = torch.randn(facts.hidden_size, 4) * 0.2
        if point < facts.n_layers and head == "untied":
            tensors[f"heads.{point}.weight"] = torch.randn(shortlist or facts.vocab_size, facts.hidden_size) * 0.3
    return tensors


def write_bundle(folder: Path, facts: ModelFacts, tensors: dict[str, torch.Tensor], **fields: object) -> Path:
    """`exits.json` and `exits.safetensors` as they stand on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors or {"nothing": torch.zeros(1)}, folder / TENSORS)
    manifest = {
        "model": facts.name,
        "weights_hash": facts.weights_hash,
        "n_layers": facts.n_layers,
        "hidden_size": facts.hidden_size,
        "vocab_size": facts.vocab_size,
        "rank": 4 if fields["head"] == "lens" else None,
        "tensors_hash": hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest(),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest | fields))
    return folder


def random_prompts(count: int, *, seed: int = 0, shortest: int = 1, longest: int = 40) -> list[Prompt]:
    """Random token ids, no end-of-sequence among them; the first and the last lengths are the extremes."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=draw).tolist()
    lengths[0], lengths[-1] = shortest, longest
    return [Prompt(torch.randint(1, VOCABULARY, (length,), generator=draw).tolist()) for length in lengths]
