"""One file a family: how its weights become a `LayerStack`. Third parties add one through `shortstop.architectures`."""

from typing import TYPE_CHECKING

from engine.errors import BadInput
from engine.registry import Registry
from engine.stack import LayerStack

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _llama(model: "PreTrainedModel") -> LayerStack:
    from engine.architectures.llama import LlamaStack

    return LlamaStack(model)


def _gpt2(model: "PreTrainedModel") -> LayerStack:
    from engine.architectures.gpt2 import GPT2Stack

    return GPT2Stack(model)


#: `model_type` of a Hugging Face configuration → a function from its model to a stack
architectures = Registry("architecture", "architectures", {"llama": _llama, "gpt2": _gpt2})


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
