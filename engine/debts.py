"""Tokens that left early still owe keys and values of the layers they skipped. Two ways to pay.

`copy` (SEC; CALM, Schuster et al. 2022): the state at the exit goes through each skipped layer's norm and key/value
projection at once. `recompute` (deferred depth, after FREE, Bae et al. 2023, and EE-LLM, Chen et al. 2024): the token
waits, and the next token of its row that goes deeper takes it along. Then keys and values equal those of a plain
forward pass.
"""

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.cache import KeyValues, Span
from engine.cost import Work
from engine.spec import PolicySpec
from engine.stack import LayerStack


class Debts(ABC):
    """What the rows of one batch owe while they decode. `step` counts a row's forward passes; 0 is its prefill."""

    def __init__(self, stack: LayerStack, cache: KeyValues, prompts: list[int], steps: int, work: Work) -> None:
        self.stack, self.cache, self.work = stack, cache, work
        self.prompts = prompts  # [rows] prompt lengths: step s stands at position prompt + s - 1
        #: layers computed so far for each forward pass, [rows, steps]
        self.layers_run: npt.NDArray[np.int16] = np.zeros((len(prompts), steps), np.int16)
        self.layers_run[:, 0] = stack.n_layers

    @abstractmethod
    def join(self, rows: list[int], step: int, layer: int, states: Tensor) -> tuple[Span, Tensor]:
        """The tokens that pass `layer` now: each row's newest, whose states are given, and those that wait there."""

    @abstractmethod
    def advance(self, span: Span, step: int, states: Tensor, layer: int) -> None:
        """The tokens of `span` have passed all layers before `layer`."""

    @abstractmethod
    def leave(self, rows: list[int], step: int, states: Tensor, layer: int) -> None:
        """The newest tokens of these rows leave after `layer` layers, with these states [rows, hidden]."""

    def may_leave(self, row: int, step: int) -> bool:
        """Whether the row can take on one more debt."""
        return True

    def _newest(self, rows: list[int], step: int) -> Span:
        return Span(rows, [self.prompts[row] + step - 1 for row in rows], [1] * len(rows))


class Copied(Debts):
    """Debts are paid when they are made, with keys and values that are only an estimate."""

    def join(self, rows: list[int], step: int, layer: int, states: Tensor) -> tuple[Span, Tensor]:
        return self._newest(rows, step), states

    def advance(self, span: Span, step: int, states: Tensor, layer: int) -> None:
        self.layers_run[span.rows, step] = layer

    def leave(self, rows: list[int], step: int, states: Tensor, layer: int) -> None:
        self.stack.fill(states, self._newest(rows, step), self.cache, layer, self.stack.n_layers)
        self.work.fill(layers=self.stack.n_layers - layer, tokens=len(rows))


class Deferred(Debts):
    """Tokens wait at the depth where they left. Along a row depths never rise, so those at one depth are a suffix."""

    def __init__(
        self, stack: LayerStack, cache: KeyValues, prompts: list[int], steps: int, work: Work, max_debt: int
    ) -> None:
        super().__init__(stack, cache, prompts, steps, work)
        self.max_debt = max_debt
        self.states = torch.zeros((len(prompts), steps, stack.hidden_size), dtype=cache.keys.dtype, device=stack.device)

    def join(self, rows: list[int], step: int, layer: int, states: Tensor) -> tuple[Span, Tensor]:
        firsts = [self._first_at(row, step, layer) for row in rows]
        counts = [step - first + 1 for first in firsts]
        span = Span(rows, [self.prompts[row] + first - 1 for row, first in zip(rows, firsts, strict=True)], counts)
        if span.single:
            return span, states
        self.states[rows, step] = states
        waiting_rows, positions = span.flat
        steps = [position - self.prompts[row] + 1 for row, position in zip(waiting_rows, positions, strict=True)]
        return span, self.states[waiting_rows, steps]

    def advance(self, span: Span, step: int, states: Tensor, layer: int) -> None:
        rows, positions = span.flat
        steps = [position - self.prompts[row] + 1 for row, position in zip(rows, positions, strict=True)]
        self.layers_run[rows, steps] = layer
        if layer < self.stack.n_layers:
            self.states[rows, steps] = states

    def leave(self, rows: list[int], step: int, states: Tensor, layer: int) -> None:
        """They wait where `advance` left them."""

    def may_leave(self, row: int, step: int) -> bool:
        return int((self.layers_run[row, :step] < self.stack.n_layers).sum()) < self.max_debt

    def pay(self, rows: list[int], last: list[int]) -> None:
        """Take all that still wait, up to each row's step `last`, to full depth."""
        for row, step in zip(rows, last, strict=True):
            depth = int(self.layers_run[row, step])
            while depth < self.stack.n_layers:
                deeper = sorted({int(d) for d in self.layers_run[row, : step + 1] if d > depth})
                span, states = self.join([row], step, depth, self.states[row, step][None])
                states = self.stack.run(states, span, self.cache, depth, deeper[0])
                depth = deeper[0]
                self.advance(span, step, states, depth)

    def _first_at(self, row: int, step: int, layer: int) -> int:
        """The earliest step of the row that waits at `layer`, or the newest."""
        first = step
        while first > 1 and self.layers_run[row, first - 1] == layer:
            first -= 1
        return first


def build_debts(
    policy: PolicySpec, stack: LayerStack, cache: KeyValues, prompts: list[int], steps: int, work: Work
) -> Debts:
    """The way of paying that a policy asks for."""
    if policy.kv == "recompute":
        return Deferred(stack, cache, prompts, steps, work, policy.max_debt)
    return Copied(stack, cache, prompts, steps, work)
