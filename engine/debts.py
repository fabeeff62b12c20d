"""Tokens that left early still owe keys and values of the layers they skipped. Three ways to pay.

`copy` (SEC; CALM, Schuster et al. 2022): the state at the exit goes through each skipped layer's norm and key/value
projection at once. `recompute` (deferred depth, after FREE, Bae et al. 2023, and EE-LLM, Chen et al. 2024): the token
waits, and the next token of its row that goes deeper takes it along. Then keys and values equal those of a plain
forward pass. `mask`: they are never paid, and later tokens do not see the missing keys.

A row's forward passes are counted by `step`; 0 is its prefill, and step s stands at position prompt + s - 1. Rows may
be at different steps: where a draft was wrong, a row goes back.
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
    """What the rows of one batch owe while they decode."""

    def __init__(self, stack: LayerStack, cache: KeyValues, prompts: list[int], steps: int, work: Work) -> None:
        self.stack, self.cache, self.work = stack, cache, work
        self.prompts = prompts  # [rows] prompt lengths
        #: layers computed so far for each forward pass, [rows, steps]
        self.layers_run: npt.NDArray[np.int16] = np.zeros((len(prompts), steps), np.int16)
        self.layers_run[:, 0] = stack.n_layers
        self._last = Span([], [], [])

    @abstractmethod
    def join(self, rows: list[int], steps: list[int], layer: int, states: Tensor) -> tuple[Span, Tensor]:
        """The tokens that pass `layer` now: each row's newest, whose states are given, and those that wait there."""

    @abstractmethod
    def advance(self, span: Span, states: Tensor, layer: int) -> None:
        """The tokens of `span` have passed all layers before `layer`."""

    @abstractmethod
    def leave(self, rows: list[int], steps: list[int], states: Tensor, layer: int) -> None:
        """The newest tokens of these rows leave after `layer` layers, with these states [rows, hidden]."""

    def may_leave(self, row: int, step: int) -> bool:
        """Whether the row can take on one more debt."""
        return True

    def waiting(self, row: int, step: int) -> int:
        """How many of the row's tokens before `step` owe anything that will be paid."""
        return 0

    def depths(self, rows: list[int], steps: list[int], layer: int) -> list[int]:
        """The depths behind `layer` at which tokens of these rows, before these steps, wait; rising."""
        return []

    def steps_of(self, span: Span) -> tuple[list[int], list[int]]:
        """Row and step of each token, [tokens] each."""
        rows, positions = span.flat
        return rows, [position - self.prompts[row] + 1 for row, position in zip(rows, positions, strict=True)]

    def _newest(self, rows: list[int], steps: list[int]) -> Span:
        """One and the same span while the same tokens go on: what a stack makes of it is made once."""
        positions = [self.prompts[row] + step - 1 for row, step in zip(rows, steps, strict=True)]
        if self._last.rows != rows or self._last.starts != positions:
            self._last = Span(rows, positions, [1] * len(rows))
        return self._last


class _Settled(Debts):
    """Nobody waits: what is owed is settled when a token leaves."""

    def join(self, rows: list[int], steps: list[int], layer: int, states: Tensor) -> tuple[Span, Tensor]:
        return self._newest(rows, steps), states

    def advance(self, span: Span, states: Tensor, layer: int) -> None:
        for row, position in zip(span.rows, span.starts, strict=True):
            self.layers_run[row, position - self.prompts[row] + 1] = layer


class Copied(_Settled):
    """Paid at once, with keys and values that are only an estimate."""

    def leave(self, rows: list[int], steps: list[int], states: Tensor, layer: int) -> None:
        self.stack.fill(states, self._newest(rows, steps), self.cache, layer, self.stack.n_layers)
        self.work.fill(layers=self.stack.n_layers - layer, tokens=len(rows))


class Masked(_Settled):
    """Never paid: deeper layers do not see the token."""

    def leave(self, rows: list[int], steps: list[int], states: Tensor, layer: int) -> None:
        span = self._newest(rows, steps)
        self.cache.hide(span.rows, span.starts, layer)


class Deferred(Debts):
    """Tokens wait at the depth where they left. Along a row depths never rise, so those at one depth are a suffix."""

    def __init__(
        self, stack: LayerStack, cache: KeyValues, prompts: list[int], steps: int, work: Work, max_debt: int
    ) -> None:
        super().__init__(stack, cache, prompts, steps, work)
        self.max_debt = max_debt
        self.states = torch.zeros((len(prompts), steps, stack.hidden_size), dtype=cache.keys.dtype, device=stack.device)

    def join(self, rows: list[int], steps: list[int], layer: int, states: Tensor) -> tuple[Span, Tensor]:
        firsts = [self._first_at(row, step, layer) for row, step in zip(rows, steps, strict=True)]
        if firsts == steps:
            return self._newest(rows, steps), states
        counts = [step - first + 1 for step, first in zip(steps, firsts, strict=True)]
        span = Span(rows, [self.prompts[row] + first - 1 for row, first in zip(rows, firsts, strict=True)], counts)
        self.states[rows, steps] = states
        return span, self.states[self.steps_of(span)]

    def advance(self, span: Span, states: Tensor, layer: int) -> None:
        places = self.steps_of(span)
        self.layers_run[places] = layer
        if layer < self.stack.n_layers:
            self.states[places] = states

    def leave(self, rows: list[int], steps: list[int], states: Tensor, layer: int) -> None:
        """They wait where `advance` left them."""

    def may_leave(self, row: int, step: int) -> bool:
        return self.waiting(row, step) < self.max_debt

    def waiting(self, row: int, step: int) -> int:
        return int((self.layers_run[row, :step] < self.stack.n_layers).sum())

    def depths(self, rows: list[int], steps: list[int], layer: int) -> list[int]:
        found = {depth for row, step in zip(rows, steps, strict=True) for depth in self.layers_run[row, :step].tolist()}
        return sorted(depth for depth in found if layer < depth < self.stack.n_layers)

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
    if policy.kv == "mask":
        return Masked(stack, cache, prompts, steps, work)
    return Copied(stack, cache, prompts, steps, work)
