"""The loop: one step gives every living row its next token, and each row decides alone how deep it goes."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.cache import KeyValues, Span
from engine.cost import Work
from engine.debts import Debts, build_debts
from engine.errors import NumericalError
from engine.heads import Heads, Prediction, choose, full_depth
from engine.policies import EXIT, STOP, Rule, Verdict, View
from engine.record import Decision, Finish, TokenRecords
from engine.spec import PolicySpec
from engine.stack import LayerStack


@dataclass(frozen=True)
class Prefill:
    """Prompts that have gone through the model once: their keys and values, and the token that follows each."""

    cache: KeyValues
    prompts: list[int]  #: [rows] prompt lengths in tokens
    first: Prediction  #: [rows] the first token of each completion, at full depth


@dataclass(frozen=True)
class Ends:
    """What ends a completion."""

    max_new_tokens: int
    tokens: dict[int, Finish]  #: ids that end it, such as end-of-sequence or a line's end
    first: list[Finish | None] | None = None  #: [rows] what the first tokens, out of prefill, end; as `tokens` if None


def prefill(
    stack: LayerStack, prompts: list[list[int]], room: int, allowed: list[Tensor | None] | None = None
) -> Prefill:
    """Run whole prompts, token ids of any lengths from 1 on, leaving `room` positions for what follows.

    `allowed` restricts a row's first token to some ids of the vocabulary.
    """
    lengths = [len(prompt) for prompt in prompts]
    span = Span(list(range(len(prompts))), [0] * len(prompts), lengths)
    cache = stack.new_cache(len(prompts), max(lengths) + room)
    ids = torch.tensor([token for prompt in prompts for token in prompt], device=stack.device)
    positions = torch.tensor(span.flat[1], device=stack.device)
    states = stack.run(stack.embed(ids, positions), span, cache, 0, stack.n_layers)
    logits = stack.unembed(stack.norm(states[span.last]))
    for row, ids_allowed in enumerate(allowed or []):
        if ids_allowed is not None:
            kept = logits[row, ids_allowed]
            logits[row] = -torch.inf
            logits[row, ids_allowed] = kept
    return Prefill(cache, lengths, choose(logits))


def decode(
    stack: LayerStack, heads: Heads, rule: Rule, policy: PolicySpec, start: Prefill, ends: Ends
) -> tuple[list[TokenRecords], list[Finish], Work, Debts]:
    """Complete every row of a prefill under one policy. The prefill's cache is written to: pass a copy."""
    batch = _Batch(stack, heads, rule, policy, start, ends)
    while batch.living:
        batch.step()
    return batch.records(), batch.finishes(), batch.work, batch.debts


class _Batch:
    """Rows that decode together. Step s writes token s of each living row; token 0 comes out of prefill."""

    def __init__(
        self, stack: LayerStack, heads: Heads, rule: Rule, policy: PolicySpec, start: Prefill, ends: Ends
    ) -> None:
        self.stack, self.heads, self.rule, self.ends = stack, heads, rule, ends
        rows = len(start.prompts)
        self.prompts, self.cache, self.work = start.prompts, start.cache, Work()
        self.debts = build_debts(policy, stack, start.cache, start.prompts, ends.max_new_tokens, self.work)
        self.ids = np.full((rows, ends.max_new_tokens), -1, np.int32)
        self.exit_layers = np.zeros_like(self.ids, dtype=np.int16)
        self.decisions = np.zeros_like(self.exit_layers)
        self.confidences = np.zeros_like(self.ids, dtype=np.float32)
        self.finished: dict[int, tuple[Finish, int]] = {}  # row → why, and how many records it has
        self.living = list(range(rows))
        self.next_step = 0
        self.rule.begin(rows, stack.device)
        self._write(self.living, start.first, stack.n_layers, Decision.FULL)
        self._end_step()

    def step(self) -> None:
        """One forward pass of every living row, as deep as each one goes."""
        rows, step, depth = self.living, self.next_step, 0
        positions = torch.tensor([self.prompts[row] + step - 1 for row in rows], device=self.stack.device)
        states = self.stack.embed(torch.tensor(self.ids[rows, step - 1], device=self.stack.device), positions)
        for point in self.rule.points:
            states, depth = self._deepen(rows, states, depth, point), point
            rows, states = self._ask(rows, states, point)
            if not rows:
                break
        else:
            states = self._deepen(rows, states, depth, self.stack.n_layers)
            self._write(rows, self._full_depth(states), self.stack.n_layers, Decision.FULL)
        self._end_step()

    def _deepen(self, rows: list[int], states: Tensor, first: int, end: int) -> Tensor:
        """Take the newest tokens of these rows, and the debts that they meet, from layer `first` to `end`."""
        if first == end:
            return states
        span, states = self.debts.join(rows, self.next_step, first, states)
        states = self.stack.run(states, span, self.cache, first, end)
        self.work.run(layers=end - first, tokens=span.size, context=span.context)
        self.debts.advance(span, self.next_step, states, end)
        return states if span.single else states[span.last]

    def _ask(self, rows: list[int], states: Tensor, point: int) -> tuple[list[int], Tensor]:
        """Let the rule decide at an exit point; give back the rows that go on, with their states."""
        view = View(self.heads, point, torch.tensor(rows, device=self.stack.device), states)
        verdict = self.rule.decide(view)
        if view.predicted:
            self.work.head(parameters=self.heads.parameters(point), states=len(rows))
        decisions = [
            EXIT * self.debts.may_leave(row, self.next_step) if decision == EXIT else decision
            for row, decision in zip(rows, verdict.decisions.tolist(), strict=True)
        ]
        leaving = [place for place, decision in enumerate(decisions) if decision == EXIT]
        if leaving:
            self._leave([rows[place] for place in leaving], states[leaving], self._predict(view, leaving), point)
        stopping = [place for place, decision in enumerate(decisions) if decision == STOP]
        if stopping:
            self._stop([rows[place] for place in stopping], verdict, stopping, point)
        going_on = [place for place, decision in enumerate(decisions) if decision not in (EXIT, STOP)]
        if len(going_on) == len(rows):
            return rows, states
        return [rows[place] for place in going_on], states[going_on]

    def _predict(self, view: View, places: list[int]) -> Prediction:
        """The head's choice for the rows that leave: only they pay for it, unless the rule has asked already."""
        if view.predicted:
            return Prediction(view.prediction.tokens[places], view.prediction.confidences[places])
        self.work.head(parameters=self.heads.parameters(view.point), states=len(places))
        return self.heads.predict(view.point, view.states[places])

    def _full_depth(self, states: Tensor) -> Prediction:
        self.work.head(parameters=self.stack.unembedding.numel(), states=len(states))
        return full_depth(self.stack, states)

    def _leave(self, rows: list[int], states: Tensor, prediction: Prediction, point: int) -> None:
        self.debts.leave(rows, self.next_step, states, point)
        self._write(rows, prediction, point, Decision.EXIT)

    def _stop(self, rows: list[int], verdict: Verdict, places: list[int], point: int) -> None:
        step = self.next_step
        self.exit_layers[rows, step] = point
        self.decisions[rows, step] = Decision.STOP
        if verdict.stop_confidences is not None:
            self.confidences[rows, step] = verdict.stop_confidences[places].float().cpu()
        for row in rows:
            self.finished[row] = (Finish.STOP, step + 1)

    def _write(self, rows: list[int], prediction: Prediction, layer: int, decision: Decision) -> None:
        step = self.next_step
        tokens, confidences = prediction.tokens.tolist(), prediction.confidences.cpu().numpy()
        for row, token, confidence in zip(rows, tokens, confidences, strict=True):
            if not np.isfinite(confidence):
                where = f"after layer {layer}, at position {self.prompts[row] + step}"
                raise NumericalError(f"row {row}: the logits {where} are not finite; check the weights and the dtype.")
            if end := self._end(row, token):
                self.finished[row] = (end, step + 1)
            elif step + 1 == self.ends.max_new_tokens:
                self.finished[row] = (Finish.LENGTH, step + 1)
        self.ids[rows, step] = tokens
        self.exit_layers[rows, step] = layer
        self.decisions[rows, step] = decision
        self.confidences[rows, step] = confidences

    def _end(self, row: int, token: int) -> Finish | None:
        if self.next_step == 0 and self.ends.first is not None:
            return self.ends.first[row]
        return self.ends.tokens.get(token)

    def _end_step(self) -> None:
        self.living = [row for row in self.living if row not in self.finished]
        self.next_step += 1

    def finishes(self) -> list[Finish]:
        return [self.finished[row][0] for row in range(len(self.prompts))]

    def records(self) -> list[TokenRecords]:
        counts = [self.finished[row][1] for row in range(len(self.prompts))]
        return [
            TokenRecords(
                token_ids=self.ids[row, :n],
                exit_layers=self.exit_layers[row, :n],
                layers_run=self.debts.layers_run[row, :n],
                decisions=self.decisions[row, :n],
                confidences=self.confidences[row, :n],
            )
            for row, n in enumerate(counts)
        ]
