"""What the cost model knows of a model, read from its configuration and the headers of its weights. No torch here."""

import re
from math import prod
from typing import TYPE_CHECKING, Any

from engine.cost import Shape
from engine.exits import ExitsManifest

if TYPE_CHECKING:
    from engine.loading import ModelFacts

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: names of the tensors of a model's first layer
_FIRST_LAYER = re.compile(r"(^|\.)(h|layers)\.0\.")


def model_shape(facts: "ModelFacts", dtype: str) -> Shape:
    """The shape of a model that is not loaded: that of its `LayerStack`."""
    config = read_config(facts)
    return Shape(
        n_layers=facts.n_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=kv_heads(config),
        head_size=head_size(config, facts),
        hidden_size=facts.hidden_size,
        layer_parameters=_layer_parameters(facts),
        element_size=BYTES[dtype],
    )


def head_parameters(facts: "ModelFacts", manifest: ExitsManifest) -> tuple[int, ...]:
    """Parameters that a state multiplies with in the head at each exit point, and in full depth's unembedding."""
    lens = 2 * (manifest.rank or 0) * manifest.hidden_size if manifest.head == "lens" else 0
    head = lens + (manifest.shortlist or manifest.vocab_size) * manifest.hidden_size
    early = [point for point in manifest.exit_points if point < manifest.n_layers]
    return (*(head for _ in early), facts.vocab_size * facts.hidden_size)


def read_config(facts: "ModelFacts") -> Any:
    """The Hugging Face configuration."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(facts.folder, local_files_only=True, trust_remote_code=False)


def kv_heads(config: Any) -> int:
    """Heads of keys and values."""
    if getattr(config, "multi_query", False):  # GPT-BigCode
        return 1
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def head_size(config: Any, facts: "ModelFacts") -> int:
    """Numbers of one head."""
    return int(getattr(config, "head_dim", None) or facts.hidden_size // config.num_attention_heads)


def _layer_parameters(facts: "ModelFacts") -> int:
    """Of the matrices of the first layer."""
    from safetensors import safe_open

    total = 0
    for file in facts.folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys() if _FIRST_LAYER.search(name)]  # noqa: SIM118
            total += sum(prod(shape) for shape in shapes if len(shape) == 2)
    return total
