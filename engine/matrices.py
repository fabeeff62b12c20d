"""The weight matrices of a stack, each multiplied with tokens by the kernel that is fastest for their number.

Which kernel that is depends on the processor and changes with the number of tokens, by factors of two to four
(`docs/decisions/kernels.md`), so it is measured: once per device class and shape. Everyone else reads what was found.
"""

from torch import Tensor

from engine.kernels import KERNELS, Kernel, bucket


class Matrix:
    """Weights [outputs, inputs], and perhaps a bias [outputs]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.plan(["linear"])

    def __call__(self, states: Tensor) -> Tensor:
        """States [tokens, inputs] times the matrix, plus the bias: [tokens, outputs]."""
        kernels = self._kernels
        return kernels[min(bucket(len(states)), len(kernels) - 1)](states, self.weight, self.bias)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)"""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def parameters(self) -> int:
        return self.weight.numel()

    def plan(self, kernels: list[str]) -> None:
        """Use these kernels, by names in `KERNELS`, one a bucket of token counts; the last serves all larger counts."""
        self._kernels: list[Kernel] = [KERNELS[name] for name in kernels]

    def outputs(self, start: int, end: int | None = None) -> "Matrix":
        """The same matrix for some of its outputs only; the weights are shared."""
        return Matrix(self.weight[start:end], None if self.bias is None else self.bias[start:end])
