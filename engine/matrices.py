"""The weight matrices of a stack, each multiplied with tokens by the kernel that is fastest for their number.

Which kernel that is depends on the processor and changes with the number of tokens, so it is measured: once per device
class and shape. Everyone else reads what was found.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from engine.errors import BadInput
from engine.kernels import (
    ANY,
    COUNTS,
    DENSE,
    KERNELS,
    PLAIN,
    VERSION,
    Layouts,
    Product,
    dense_again,
    is_plan,
    laid_out,
    layout_of,
    measure,
    place,
)
from engine.memory import forget_pages


class Matrix:
    """Weights [outputs, inputs], and perhaps a bias [outputs]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, layouts: Layouts = ANY) -> None:
        self.bias, self.layouts = bias, layouts
        self.shape: tuple[int, int] = (weight.shape[0], weight.shape[1])
        self._kept, self._layout = weight, "dense"
        self._multiply: Product = self._product
        self.use(PLAIN)

    def __call__(self, states: Tensor) -> Tensor:
        """States [tokens, inputs] times the matrix, plus the bias: [tokens, outputs]."""
        return self._multiply(states)

    def stay_uncompiled(self) -> None:
        """Compiled code calls the product as it is: the kernel depends on the number of tokens, and may be numpy's."""
        self._multiply = torch.compiler.disable(self._product)

    def _product(self, states: Tensor) -> Tensor:
        return self._products[place(states.shape[0])](states)

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def name(self) -> str:
        """Matrices of one name share a plan."""
        layouts = " or ".join(" and ".join(together) for together in self.layouts)
        return f"{self.shape[0]}x{self.shape[1]} {layouts}, {VERSION}"

    @property
    def weight(self) -> Tensor:
        """The weights as they came, [outputs, inputs]; a copy where the plan has them in another layout."""
        return dense_again(self._kept, self._layout)

    def use(self, kernels: Sequence[str]) -> None:
        """Multiply with these kernels from now on, by names in `KERNELS`, one for each of `COUNTS`."""
        weight = self.weight
        lying = {layout: laid_out(weight, layout) for layout in {layout_of(name) for name in kernels}}
        made = {name: KERNELS[name](lying[layout_of(name)], self.bias) for name in set(kernels)}
        self._products: list[Product] = [made[name] for name in kernels]
        self._layout = "dense" if self.layouts != ANY or len(lying) > 1 else next(iter(lying))
        self._kept = lying.get(self._layout, weight)
        if len(lying) > 1 or self._layout not in lying:
            forget_pages(weight)  # what is still read of it comes back from its file

    def outputs(self, start: int, end: int | None = None) -> "Matrix":
        """The same matrix for some of its outputs only."""
        weight, bias = self.weight[start:end], None if self.bias is None else self.bias[start:end]
        # A part would keep the whole alive once that is packed.
        return Matrix(weight if self.layouts == DENSE else weight.clone(), bias, layouts=self.layouts)


def names(matrices: Iterable[Matrix]) -> list[str]:
    """The names of all different matrices, in a fixed order."""
    return sorted({matrix.name for matrix in matrices})


def measure_plans(matrices: Iterable[Matrix], wanted: Iterable[str]) -> dict[str, list[str]]:
    """The fastest kernels for the matrices of each wanted name: half a second each, on an idle machine."""
    every = list(matrices)
    alike = {name: [matrix for matrix in every if matrix.name == name] for name in wanted}
    return {name: measure([m.weight for m in same], same[0].layouts) for name, same in alike.items()}


def use_plans(matrices: Iterable[Matrix], plans: dict[str, list[str]]) -> None:
    """Let each matrix multiply by the plan under its name. Raises `BadInput` where a plan is not of this version."""
    for matrix in matrices:
        if not is_plan(plans.get(matrix.name)):
            raise BadInput(
                f"kernels for shape {matrix.name!r} are {plans.get(matrix.name)!r}; give {len(COUNTS)} names among "
                f"{', '.join(KERNELS)}, or remove the row so that it is measured again."
            )
        matrix.use(plans[matrix.name])
