"""How likely given tokens are under a policy: the loop of `engine.decode`, with the tokens told instead of chosen.

Every row goes as deep as its policy says at each of the given tokens, and the head there says how likely the token is.
As in a completion the first one comes out of prefill, at full depth. A policy that would give up goes on: a stop is no
token. Under `verify` every token is full depth's own, so likelihoods are those of `full`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.decode import Decoding, Ends, Prefill, first_logits
from engine.heads import Choice, Heads, Prediction, choose
from engine.policies import Rule, View
from engine.record import Decision, Finish
from engine.spec import PolicySpec
from engine.stack import LayerStack


@dataclass(frozen=True)
class Likelihood:
    """Of one continuation, one place a token."""

    log_probabilities: npt.NDArray[np.float64]  #: natural; -inf where the head's shortlist does not have the token
    greedy: npt.NDArray[np.bool_]  #: whether the policy would have chosen the token itself, behind those before it
    exit_layers: npt.NDArray[np.int16]


@dataclass(frozen=True)
class _Told(Choice):
    """The tokens that stand there, and what the head thought of them."""

    logs: Tensor  # [states] log probability of the token
    greedy: Tensor  # [states] whether it is the head's own choice

    def of(self, places: list[int]) -> "_Told":
        return _Told(self.tokens[places], self.confidences[places], self.logs[places], self.greedy[places])


def likelihoods(
    stack: LayerStack,
    heads: Heads,
    rule: Rule,
    policy: PolicySpec,
    contexts: list[list[int]],
    continuations: list[list[int]],
) -> list[Likelihood]:
    """contexts: token ids, at least one a row. continuations: token ids, as many in every row, at least one."""
    cache, lengths, logits, keys = first_logits(stack, contexts, len(continuations[0]))
    first = _told(choose(logits), [row[0] for row in continuations], None)
    start = Prefill(cache, lengths, first, keys)
    decoding = _Forced(stack, heads, rule, policy, start, continuations)
    decoding.run()
    return [
        Likelihood(decoding.logs[row], decoding.greedy[row], decoding.exit_layers[row])
        for row in range(len(continuations))
    ]


class _Forced(Decoding):
    """A decoding whose every token is told."""

    def __init__(
        self,
        stack: LayerStack,
        heads: Heads,
        rule: Rule,
        policy: PolicySpec,
        start: Prefill,
        targets: list[list[int]],
    ) -> None:
        length = len(targets[0])
        self.targets = targets
        self.logs = np.zeros((len(targets), length))
        self.greedy = np.zeros((len(targets), length), np.bool_)
        super().__init__(stack, heads, rule, policy, start, Ends(length, {}))

    def _choose(self, view: View, places: list[int]) -> Choice:
        rows = [view.rows[place] for place in places]
        if view.predicted:
            found, logits = view.prediction.of(places), view.prediction.logits[places]
            prediction = Prediction(found.tokens, found.confidences, logits)
        else:
            prediction = self.heads.predict(view.point, view.states[places])
        shortlist = self.heads.shortlist if view.point < self.stack.n_layers else None
        return _told(prediction, self._next(rows), shortlist)

    def _write_full(self, rows: list[int], choice: Choice) -> None:
        assert isinstance(choice, Prediction)
        super()._write_full(rows, _told(choice, self._next(rows), None))

    def _write(self, rows: list[int], choice: Choice, layer: int, decision: Decision) -> None:
        assert isinstance(choice, _Told)
        steps = [self.at[row] for row in rows]
        self.logs[rows, steps] = choice.logs.double().cpu().numpy()
        self.greedy[rows, steps] = choice.greedy.cpu().numpy()
        super()._write(rows, choice, layer, decision)

    def _stop(self, row: int, point: int, confidence: float) -> bool:
        return False

    def _end(self, row: int, step: int, token: int) -> Finish | None:
        return None

    def _next(self, rows: Sequence[int]) -> list[int]:
        return [self.targets[row][self.at[row]] for row in rows]


def _told(prediction: Prediction, targets: list[int], shortlist: Tensor | None) -> _Told:
    """prediction: of the states that these tokens follow. shortlist: of its head, where that has one."""
    tokens = torch.tensor(targets, device=prediction.tokens.device)
    logs = prediction.logits.log_softmax(dim=-1)
    if shortlist is None:
        chosen = logs.gather(1, tokens[:, None])[:, 0]
    else:
        is_it = tokens[:, None] == shortlist[None, :]
        chosen = torch.where(is_it.any(dim=1), (logs * is_it).sum(dim=1), -torch.inf)
    return _Told(tokens, prediction.confidences, chosen, tokens == prediction.tokens)
