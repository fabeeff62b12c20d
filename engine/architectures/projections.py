"""How the projections of the Hugging Face classes become matrices.

Joined or reordered weights are copies: the modules that they come from give their memory back, or a model would be
held twice.
"""

from typing import Any

import torch
from torch import Tensor, nn

from engine.kernels import ANY, Layouts
from engine.matrices import Matrix
from engine.memory import forget_pages


def side_by_side(*projections: nn.Linear, layouts: Layouts = ANY) -> Matrix:
    """Several projections of one input as one."""
    biases = [projection.bias.data for projection in projections if projection.bias is not None]
    if len(projections) == 1:
        return Matrix(projections[0].weight.data, *biases, layouts=layouts)
    weight = torch.cat([projection.weight.data for projection in projections])
    for projection in projections:
        _give_back(projection)
    return Matrix(weight, torch.cat(biases) if biases else None, layouts=layouts)


def turned(projection: Any) -> Matrix:
    """The matrix of a `Conv1D`, which stores [inputs, outputs]."""
    weight = projection.weight.data.t().contiguous()
    _give_back(projection)
    return Matrix(weight, projection.bias.data)


def gathered(projection: nn.Linear, groups: int, order: tuple[int, int, int] = (0, 1, 2)) -> Matrix:
    """All queries, all keys, all values of a projection whose outputs come in groups, each with its share of the three.

    order: where in a group its queries, its keys and its values stand.
    """

    def gather(outputs: Tensor) -> Tensor:
        return outputs.unflatten(0, (groups, 3, -1))[:, list(order)].transpose(0, 1).flatten(0, 2)

    weight = gather(projection.weight.data)
    _give_back(projection)
    return Matrix(weight, None if projection.bias is None else gather(projection.bias.data))


def _give_back(projection: Any) -> None:
    forget_pages(projection.weight.data)
    projection.weight.data = projection.weight.data.new_empty(0)
