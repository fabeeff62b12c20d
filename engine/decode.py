"""The loop: one step takes every living row one token further, and each row decides alone how deep it goes.

Under `verify` the tokens that leave are drafts. A row that reaches full depth takes its waiting tokens along, and each
of them gets full depth's own choice: up to the first that differs the drafts are kept, there full depth's token stands,
and everything behind it never happened. What ends a completion acts at full depth only, so nothing that is undone has
ended anything. Without stop the tokens are those of full depth (speculative decoding, Leviathan et al. 2023; with the
model's own layers as the draft, LayerSkip, Elhoushi et al. 2024).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from engine import native
from engine.cache import KeyValues, Span
from engine.cost import Work
from engine.debts import build_debts
from engine.errors import NumericalError
from engine.heads import Choice, Heads, Prediction, choose, full_depth
from engine.policies import CONTINUE, EXIT, STOP, Batch, Rule, View
from engine.record import Decision, Finish, TokenRecords
from engine.spec import PolicySpec
from engine.stack import LayerStack
from engine.text import prompt_key


@dataclass(frozen=True)
class Prefill:
    """Prompts that have gone through the model once: their keys and values, and the token that follows each."""

    cache: KeyValues
    prompts: list[int]  #: [rows] prompt lengths in tokens
    first: Choice  #: [rows] the first token of each completion, at full depth
    keys: list[int]  #: [rows] a number for each prompt, the same wherever that prompt is decoded

    def copy(self) -> "Prefill":
        """One to decode from: a decode writes to the cache."""
        return replace(self, cache=self.cache.copy())


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
    cache, lengths, logits, keys = first_logits(stack, prompts, room)
    for row, ids_allowed in enumerate(allowed or []):
        if ids_allowed is not None:
            kept = logits[row, ids_allowed]
            logits[row] = -torch.inf
            logits[row, ids_allowed] = kept
    first = choose(logits)
    return Prefill(cache, lengths, Choice(first.tokens, first.confidences), keys)


def first_logits(
    stack: LayerStack, prompts: list[list[int]], room: int
) -> tuple[KeyValues, list[int], Tensor, list[int]]:
    """As `prefill`, but for the choice: cache, lengths, logits [rows, vocabulary] of each first token, keys."""
    lengths = [len(prompt) for prompt in prompts]
    span = Span(list(range(len(prompts))), [0] * len(prompts), lengths)
    cache = stack.new_cache(len(prompts), max(lengths) + room)
    ids = torch.tensor([token for prompt in prompts for token in prompt], device=stack.device)
    positions = torch.tensor(span.flat[1], device=stack.device)
    states = stack.run(stack.embed(ids, positions), span, cache, 0, stack.n_layers)
    keys = [prompt_key(prompt) for prompt in prompts]
    return cache, lengths, stack.unembed(stack.norm(states[span.last])), keys


class Decoding:
    """Rows that decode together under one policy. Token s of a row is written by its step s; 0 came out of prefill.

    Rows may be at different steps: one whose drafts were undone goes back. The prefill's cache is written to.
    """

    def __init__(
        self, stack: LayerStack, heads: Heads, rule: Rule, policy: PolicySpec, start: Prefill, ends: Ends
    ) -> None:
        self.stack, self.heads, self.rule, self.policy, self.ends = stack, heads, rule, policy, ends
        rows, new = len(start.prompts), ends.max_new_tokens
        self.prompts, self.cache, self.work = start.prompts, start.cache, Work()
        self.debts = build_debts(policy, stack, start.cache, start.prompts, new, self.work)
        self.ids = np.full((rows, new), -1, np.int32)
        self.exit_layers = np.zeros((rows, new), np.int16)
        self.decisions = np.zeros((rows, new), np.int16)
        self.confidences = np.zeros((rows, new), np.float32)
        self.drafts = np.zeros((rows, new), np.int16)  # as `TokenRecords.drafts`; what waits to be verified is positive
        self.drafted = self.drafts_kept = 0
        self.finished: dict[int, tuple[Finish, int]] = {}  # row → why, and how many records it has
        self.living = list(range(rows))
        self.at = [0] * rows  # each row's next step
        self.firm = [1] * rows  # tokens before this step are not drafts that may be undone
        #: a row's stop that waits for its drafts to be verified: exit point and confidence
        self.stopping: dict[int, tuple[int, float]] = {}
        self.depth = stack.n_layers - len(rule.removed)  # layers that a token at full depth runs
        self.recalls = rule.recalls and heads.controller is not None and heads.controller.recalls
        self.rule.begin(Batch(start.keys, new, stack.device))
        self._write(self.living, start.first, stack.n_layers, Decision.FULL)

    def run(self) -> None:
        """Until every row has ended."""
        while self.living:
            self.step()

    def step(self) -> None:
        """One forward pass of every living row, as deep as each one goes."""
        rows, depth = self.living, 0
        steps = [self.at[row] for row in rows]
        positions = torch.tensor(
            [self.prompts[row] + step - 1 for row, step in zip(rows, steps, strict=True)], device=self.stack.device
        )
        ids = self.ids[rows, [step - 1 for step in steps]]
        states = self.stack.embed(torch.from_numpy(ids).to(self.stack.device), positions)
        self.free = {row for row in rows if self._may_leave(row)}
        for point in self.rule.points:
            if not self.rule.stops and self.free.isdisjoint(rows):
                break
            states, previous = self._deepen(rows, states, depth, point)
            rows, states, depth = *self._ask(rows, states, previous, point), point
            if not rows:
                return
        self._finish(rows, states, depth)

    def _is_asked(self, row: int) -> bool:
        if row in self.stopping:  # it has been given up already
            return False
        return row in self.free or (self.rule.stops and self.at[row] >= self.policy.full_first)

    def _may_leave(self, row: int) -> bool:
        """Whether the options that every policy has, and the row's debt, let it leave in this step."""
        policy, step = self.policy, self.at[row]
        if step < policy.full_first or not self.debts.may_leave(row, step):
            return False
        if policy.max_exits_in_row is not None and self._exits_in_row(row) >= policy.max_exits_in_row:
            return False
        # The last token ends the completion, and what ends one is never a draft.
        if policy.verify and step + 1 == self.ends.max_new_tokens:
            return False
        return self.rule.may_leave(row, self.debts.waiting(row, step))

    def _left_before(self, rows: list[int]) -> list[bool]:
        """Of each row, whether its newest token left early; a draft did, whether it was kept yet or not."""
        return [self._left(row, self.at[row] - 1) for row in rows]

    def _left(self, row: int, step: int) -> bool:
        return bool(self.decisions[row, step] == Decision.EXIT or self.drafts[row, step] > 0)

    def _exits_in_row(self, row: int) -> int:
        """How many of the row's newest tokens left early, one after another."""
        step = self.at[row]
        stayed = next((before for before in range(step - 1, -1, -1) if not self._left(row, before)), -1)
        return step - 1 - stayed

    def _deepen(self, rows: list[int], states: Tensor, first: int, point: int) -> tuple[Tensor, Tensor | None]:
        """Take the newest tokens of these rows to an exit point; where the rule looks back, the layer before it too."""
        before = self._pass(rows, states, first, point)
        if self.span.single:
            return self.passed, before
        return self.passed[self.span.last], None if before is None else before[self.span.last]

    def _pass(self, rows: list[int], states: Tensor, first: int, end: int) -> Tensor | None:
        """Take rows, and the debts that they meet, through layers `first` to `end`.

        Leaves behind `span`, the tokens that passed, and `passed`, their states; gives back the states before the last
        layer where the rule looks back.
        """
        self.span, states = self.debts.join(rows, [self.at[row] for row in rows], first, states)
        before = None
        if self.rule.looks_back and end < self.stack.n_layers:
            before = states = self._layers(states, self.span, first, end - 1)
            first = end - 1
        self.passed = self._layers(states, self.span, first, end)
        self.debts.advance(self.span, self.passed, end)
        return before

    def _layers(self, states: Tensor, span: Span, first: int, end: int) -> Tensor:
        for begin, stop in _pieces(first, end, self.rule.removed):
            states = self.stack.run(states, span, self.cache, begin, stop)
            layers, cached = stop - begin, sum(span.reach)
            self.work.run(layers=layers, tokens=span.size, context=span.context, cached=cached)
        return states

    def _ask(self, rows: list[int], states: Tensor, previous: Tensor | None, point: int) -> tuple[list[int], Tensor]:
        """Let the rule decide at an exit point; give back the rows that go on, with their states."""
        asked = [place for place, row in enumerate(rows) if self._is_asked(row)]
        if asked and self.rule.ask_above is not None:
            # The controller's word on the state alone: what it adds behind an exit would hang on undone drafts.
            judged = self.heads.judge(point, states if len(asked) == len(rows) else states[asked])[:, EXIT].tolist()
            asked = [place for place, says in zip(asked, judged, strict=True) if says > self.rule.ask_above]
        if not asked:
            return rows, states
        everyone = len(asked) == len(rows)
        of_view = [rows[place] for place in asked]
        view = View(
            self.heads,
            point,
            of_view,
            states if everyone else states[asked],
            [self.at[rows[place]] for place in asked],
            previous if everyone or previous is None else previous[asked],
            self._left_before(of_view) if self.recalls else None,
        )
        verdict = self.rule.decide(view)
        if view.predicted:
            self.work.head(parameters=self.heads.parameters(point), states=len(asked))
            self._check_finite(view.rows, view.steps, point, view.prediction.confidences)
        if verdict.stop_confidences is not None:
            self._check_finite(view.rows, view.steps, point, verdict.stop_confidences)
        decisions = [
            CONTINUE if decision == EXIT and row not in self.free else decision
            for row, decision in zip(view.rows, _listed(verdict.decisions), strict=True)
        ]
        gone = set(self._leave(view, [place for place, decision in enumerate(decisions) if decision == EXIT]))
        for place in (place for place, decision in enumerate(decisions) if decision == STOP):
            sure = 0.0 if verdict.stop_confidences is None else float(verdict.stop_confidences[place])
            if self._stop(view.rows[place], point, sure):
                gone.add(view.rows[place])
        if not gone:
            return rows, states
        going_on = [place for place, row in enumerate(rows) if row not in gone]
        return [rows[place] for place in going_on], states[going_on]

    def _leave(self, view: View, places: list[int]) -> list[int]:
        """These places of the view want to leave: write their tokens, and give back the rows that did leave."""
        if not places:
            return []
        choice = self._choose(view, places)
        if self.policy.verify:
            # A token that ends the completion is not drafted: its row goes on to full depth, which verifies all.
            drafts = [i for i, token in enumerate(choice.tokens.tolist()) if token not in self.ends.tokens]
            if not drafts:
                return []
            if len(drafts) < len(places):
                places, choice = [places[i] for i in drafts], choice.of(drafts)
        rows = [view.rows[place] for place in places]
        states = view.states if len(places) == len(view.rows) else view.states[places]
        steps = [self.at[row] for row in rows]
        self.debts.leave(rows, steps, states, view.point)
        if self.policy.verify:
            self.drafts[rows, steps] = view.point
            self.drafted += len(rows)
        self._write(rows, choice, view.point, Decision.EXIT)
        return rows

    def _choose(self, view: View, places: list[int]) -> Choice:
        """The head's choice for the rows that leave: only they pay for it, unless the rule has asked already."""
        everyone = len(places) == len(view.rows)
        if view.predicted:
            return view.prediction if everyone else view.prediction.of(places)
        self.work.head(parameters=self.heads.parameters(view.point), states=len(places))
        return self.heads.predict(view.point, view.states if everyone else view.states[places])

    def _stop(self, row: int, point: int, confidence: float) -> bool:
        """The rule gives the row up. Whether it ends at once: drafts that wait are verified first."""
        if self.firm[row] < self.at[row]:
            self.stopping[row] = point, confidence
            return False
        self._end_with_stop(row, point, confidence)
        return True

    def _end_with_stop(self, row: int, point: int, confidence: float) -> None:
        step = self.at[row]
        self.exit_layers[row, step] = point
        self.decisions[row, step] = Decision.STOP
        self.confidences[row, step] = confidence
        self._end_row(row, Finish.STOP, step + 1)

    def _finish(self, rows: list[int], states: Tensor, depth: int) -> None:
        """Take these rows from `depth` to full depth, with all that they owe, and write its choice."""
        if depth < self.stack.n_layers:  # otherwise the rule was asked behind the last layer
            for waited in self.debts.depths(rows, [self.at[row] for row in rows], depth):
                states, depth = self._deepen(rows, states, depth, waited)[0], waited
            states, _ = self._deepen(rows, states, depth, self.stack.n_layers)
        if self.policy.verify and not self.span.single:
            self._verify(self.span, self._full_depth(self.passed))
            return
        if self.rule.removed:
            self.debts.layers_run[rows, [self.at[row] for row in rows]] = self.depth
        if self.policy.preview is not None:
            rows, states = self._write_foreseen(rows, states, self.policy.preview)
        if rows:
            self._write_full(rows, self._full_depth(states))

    def _write_foreseen(self, rows: list[int], states: Tensor, count: int) -> tuple[list[int], Tensor]:
        """Write what a preview of the vocabulary finds; give back the rows that owe a choice among all of it."""
        free = [place for place, row in enumerate(rows) if self.at[row] >= self.policy.full_first]
        if not free:
            return rows, states
        assert self.heads.preview is not None
        found = self.heads.foresee(states if len(free) == len(rows) else states[free], count)
        preview = self.heads.preview
        self.work.look(parameters=preview.parameters, bytes_read=preview.bytes_read(states), states=len(free))
        for exact in found.exact:
            self.work.head(parameters=exact * self.stack.hidden_size, states=1)
        rest = sorted(set(range(len(rows))) - set(free))
        left_over = [rows[place] for place in rest], states[rest]
        self._write_full([rows[place] for place in free], Prediction(found.tokens, found.probabilities, found.logits))
        return left_over

    def _full_depth(self, states: Tensor) -> Choice:
        self.work.head(parameters=self.stack.unembedding.numel(), states=len(states))
        return full_depth(self.stack, states)

    def _write_full(self, rows: list[int], choice: Choice) -> None:
        for row in [row for row in rows if row in self.stopping]:  # nothing of it waited any more
            self._end_with_stop(row, *self.stopping.pop(row))
        if any(row in self.finished for row in rows):
            places = [place for place, row in enumerate(rows) if row not in self.finished]
            rows, choice = [rows[place] for place in places], choice.of(places)
        self._write(rows, choice, self.depth, Decision.EXIT if self.rule.removed else Decision.FULL)

    def _verify(self, span: Span, choice: Choice) -> None:
        """Full depth's choice for every token of the span: each row's drafts, and behind them its newest token."""
        tokens = choice.tokens.tolist()
        settled: list[int] = []  # places of the tokens that each row's next one is written from
        rows, begin = [], 0
        for row, count in zip(span.rows, span.counts, strict=True):
            if row in self.finished:  # it had no drafts, and the rule gave it up behind the last layer
                begin += count
                continue
            first = self.at[row] - count + 1
            drafts = self.ids[row, first : first + count - 1].tolist()
            kept = next((i for i, draft in enumerate(drafts) if draft != tokens[begin + i]), count - 1)
            self._keep(row, first, choice, begin, kept)
            if drafts:
                self.rule.verified(row, len(drafts), kept)
            if kept < len(drafts):
                self._undo(row, first + kept)
            rows.append(row)
            settled.append(begin + kept)
            begin += count
        self._write_full(rows, choice.of(settled))

    def _keep(self, row: int, first: int, choice: Choice, begin: int, kept: int) -> None:
        """So many drafts of the row from step `first` on are full depth's own tokens."""
        confidences = choice.confidences[begin : begin + kept]
        self._check_finite([row] * kept, range(first, first + kept), self.stack.n_layers, confidences)
        steps = slice(first, first + kept)
        self.exit_layers[row, steps] = self.stack.n_layers
        self.decisions[row, steps] = Decision.FULL
        self.confidences[row, steps] = confidences.float().cpu()
        self.drafts_kept += kept

    def _undo(self, row: int, step: int) -> None:
        """The row's draft at `step` is wrong: full depth's token will stand there, and what came behind never was."""
        self.stopping.pop(row, None)
        self.drafts[row, step] *= -1
        # All else of the steps behind is written anew before it is read: a stop writes no id, a full token no draft.
        self.ids[row, step + 1 :] = -1
        self.drafts[row, step + 1 :] = 0
        self.at[row] = step

    def _write(self, rows: list[int], choice: Choice, layer: int, decision: Decision) -> None:
        """The next token of each row."""
        tokens, confidences = choice.tokens.tolist(), choice.confidences.cpu().numpy()
        steps = [self.at[row] for row in rows]
        self._check_finite(rows, steps, layer, choice.confidences)
        self.ids[rows, steps] = tokens
        self.exit_layers[rows, steps] = layer
        self.decisions[rows, steps] = decision
        self.confidences[rows, steps] = confidences
        for row, step, token in zip(rows, steps, tokens, strict=True):
            self.at[row] = step + 1
            if decision != Decision.EXIT or not self.policy.verify:
                self.firm[row] = step + 1
            if end := self._end(row, step, token):
                self._end_row(row, end, step + 1)
            elif step + 1 == self.ends.max_new_tokens:
                self._end_row(row, Finish.LENGTH, step + 1)

    def _check_finite(self, rows: Sequence[int], steps: Sequence[int], layer: int, probabilities: Tensor) -> None:
        """Raises `NumericalError` for the first that is no number."""
        here = probabilities if native.fits(probabilities) else probabilities.float().cpu()
        finite = np.isfinite(here.numpy())
        if not finite.all():
            place = int(np.flatnonzero(~finite)[0])
            where = f"after layer {layer}, at position {self.prompts[rows[place]] + steps[place]}"
            raise NumericalError(f"the logits {where} are not finite; check the weights and the dtype.")

    def _end(self, row: int, step: int, token: int) -> Finish | None:
        if step == 0 and self.ends.first is not None:
            return self.ends.first[row]
        return self.ends.tokens.get(token)

    def _end_row(self, row: int, finish: Finish, records: int) -> None:
        self.finished[row] = finish, records
        self.living = [living for living in self.living if living != row]

    @property
    def finishes(self) -> list[Finish]:
        """Why each row ended."""
        return [self.finished[row][0] for row in range(len(self.prompts))]

    @property
    def records(self) -> list[TokenRecords]:
        """What is reported of each row's tokens."""
        counts = [self.finished[row][1] for row in range(len(self.prompts))]
        return [
            TokenRecords(
                token_ids=self.ids[row, :n],
                exit_layers=self.exit_layers[row, :n],
                layers_run=self.debts.layers_run[row, :n],
                decisions=self.decisions[row, :n],
                confidences=self.confidences[row, :n],
                drafts=self.drafts[row, :n],
            )
            for row, n in enumerate(counts)
        ]


def _listed(decisions: Tensor | Sequence[int]) -> Sequence[int]:
    return decisions.tolist() if isinstance(decisions, Tensor) else decisions


def _pieces(first: int, end: int, removed: frozenset[int]) -> list[tuple[int, int]]:
    """The pieces of layers `first` to `end` (excluded) between those that are removed."""
    edges = [first - 1, *sorted(layer for layer in removed if first <= layer < end), end]
    return [(a + 1, b) for a, b in pairwise(edges) if a + 1 < b]
