"""One file a family: how its weights become a `LayerStack`. Third parties add one through `shortstop.architectures`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from engine.architectures.codegen import CodeGenStack
from engine.architectures.gpt2 import GPT2Stack
from engine.architectures.gpt_bigcode import GPTBigCodeStack
from engine.architectures.llama import LlamaStack
from engine.architectures.qwen import Qwen2Stack, Qwen3Stack
from engine.architectures.starcoder2 import Starcoder2Stack
from engine.errors import BadInput
from engine.registry import Registry
from engine.stack import LayerStack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: `model_type` of a Hugging Face configuration → what makes a stack of its model
architectures: Registry[Callable[[Any], LayerStack]] = Registry(
    "architecture",
    "architectures",
    {
        "codegen": CodeGenStack,
        "gpt2": GPT2Stack,
        "gpt_bigcode": GPTBigCodeStack,
        "llama": LlamaStack,
        "qwen2": Qwen2Stack,
        "qwen3": Qwen3Stack,
        "starcoder2": Starcoder2Stack,
    },
)


def check_family(family: str) -> None:
    """Whether anybody has described this family. Raises `BadInput`; asked before weights are loaded for nothing."""
    if family not in architectures:
        raise BadInput(
            f"model family {family!r} is not known; known: {', '.join(sorted(architectures))}; "
            f"add one through the entry point group {architectures.group!r}."
        )


def build_stack(model: "PreTrainedModel") -> LayerStack:
    """The model's layers as the engine runs them. Raises `BadInput` for a family that nobody has described."""
    check_family(model.config.model_type)
    return architectures[model.config.model_type](model)
