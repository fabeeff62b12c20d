"""What policies decide where the model is not asked: the rules of `engine.policies` over a whole trace at once.

A row may leave only where the options that every policy has let it. Both limits on leaving in a row, `max_exits_in_row`
and under `recompute` `max_debt` (a token at full depth pays all that wait), come to one: of neighbours that want to
leave, every one behind so many goes to full depth.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from engine.errors import BadInput
from engine.points import check_patience, check_points, usable_points
from engine.replay.traced import Array, Traced
from engine.spec import (
    Confidence,
    Controller,
    Entropy,
    Fixed,
    Full,
    Margin,
    Patience,
    PolicySpec,
    Position,
    Random,
    Sec,
    StateSimilarity,
)

_EXIT, _STOP = 1, 2  #: places of the classes of a controller

#: for each usable point, by place: which tokens leave there
Masks = dict[int, Array]


class Oracle(PolicySpec):
    """Leave at the first exit point equal to the target, else at the first: what no policy can know (replay only)."""

    kind = "oracle"
    rule = "engine.replay.decide:Oracle"


@dataclass(frozen=True)
class Decisions:
    """What a policy does with each of n tokens."""

    places: Array  #: [n] place of the point where the token was decided; full depth is the last one
    stops: Array | None  #: [n] whether it was given up there; None: this policy never stops
    behind: Array | None  #: [n] whether it comes after a stop, and never was
    forced: Array  #: [n] whether it could not leave: a first token, or one that followed too many that had left

    @property
    def written(self) -> Array | None:
        """[n] whether the token was written; None: all were."""
        return None if self.stops is None else ~(self.stops | self.behind)


def check_replayable(policy: PolicySpec, exit_points: tuple[int, ...], n_layers: int, has_controller: bool) -> None:
    """Whether a trace with these exit points can answer for a policy. Raises `BadInput`."""
    if policy.verify:
        raise BadInput(f"policy {policy.kind!r}: what is rolled back cannot be replayed; run it, or leave verify out.")
    if type(policy) not in _RULES:
        known = ", ".join(sorted(kind.kind for kind in _RULES))
        raise BadInput(
            f"policy {policy.kind!r} cannot be replayed: a trace does not hold what it goes by; run it. Replayed are: "
            f"{known}."
        )
    if policy.needs == "controller" and not has_controller:
        raise BadInput(
            f"policy {policy.kind!r} needs the column controller, and the trace has none: its exits have no "
            "controller; trace with exits that have one."
        )
    if isinstance(policy, Fixed):
        check_points(policy, "exit_layer", [policy.exit_layer], exit_points, n_layers)
    if isinstance(policy, Random):
        check_points(policy, "exit_layers", policy.exit_layers, exit_points, n_layers)
    if isinstance(policy, Patience):
        check_patience(policy, usable_points(policy, exit_points, n_layers))


def decide(policy: PolicySpec, traced: Traced) -> Decisions:
    """What a policy that `check_replayable` let pass does with the tokens of a trace."""
    first = traced.steps < policy.full_first
    if isinstance(policy, Controller):
        return _controlled(policy, traced, first)
    wants = np.full(len(traced), traced.last, np.int8)
    for place, mask in reversed(_RULES[type(policy)](policy, traced).items()):
        wants[mask] = place
    wants[first] = traced.last
    forced = first | _held_back(policy, wants < traced.last)
    return Decisions(np.where(forced, np.int8(traced.last), wants), None, None, forced)


def usable_places(policy: PolicySpec, traced: Traced) -> list[int]:
    """Places of the points at which a token may leave."""
    usable = usable_points(policy, traced.exit_points, traced.n_layers)
    return [place for place, point in enumerate(traced.points) if point in usable]


def _held_back(policy: PolicySpec, wants: Array) -> Array:
    """[n] tokens that want to leave and may not, because too many before them have."""
    limits = [policy.max_exits_in_row, policy.max_debt if policy.kv == "recompute" else None]
    most = min((limit for limit in limits if limit is not None), default=None)
    if most is None or not wants.any():
        return np.zeros(len(wants), np.bool_)
    # A sample's first token never wants to, so no run goes from one sample into the next.
    here = np.arange(len(wants))
    stayed = np.maximum.accumulate(np.where(wants, -1, here))
    return wants & ((here - stayed) % (most + 1) == 0)


def _controlled(policy: Controller, traced: Traced, first: Array) -> Decisions:
    """SEC's rule: the likeliest class acts where its probability exceeds its threshold. Behind the last layer it can
    only stop; a token that may not leave can still be given up.
    """
    n, last = len(traced), traced.last
    leaves, gives_up = np.full(n, last, np.int8), np.full(n, last + 1, np.int8)
    places = usable_places(policy, traced)
    if traced.n_layers in traced.exit_points:
        places.append(last)
    winner, top = traced.winners
    for place in reversed(places):
        if place < last:
            leaves[(winner[place] == _EXIT) & (top[place] > policy.exit)] = place
        gives_up[(winner[place] == _STOP) & (top[place] > policy.stop)] = place
    gives_up[first] = last + 1
    leaves[first] = last
    wants = (leaves < last) & (leaves < gives_up)
    forced = first | _held_back(policy, wants)
    leaves[forced] = last
    stops = gives_up <= last
    stops &= forced | ~wants
    taken = np.where(stops, gives_up, np.where(wants, leaves, np.int8(last)))
    behind = _behind_a_stop(stops, traced)
    return Decisions(taken, stops & ~behind, behind, forced)


def _behind_a_stop(stops: Array, traced: Traced) -> Array:
    """[n] tokens that come after a stop in their sample."""
    before = np.cumsum(stops) - stops
    return np.asarray(before > np.repeat(before[traced.starts], traced.lengths))


def _by_threshold(column: str, above: bool = True) -> Callable[[Any, Traced], Masks]:
    def masks(policy: Any, traced: Traced) -> Masks:
        values: Array = getattr(traced, column)
        places = usable_places(policy, traced)
        if above:
            return {place: values[place] > policy.threshold for place in places}
        return {place: values[place] < policy.threshold for place in places}

    return masks


def _confident(policy: Confidence, traced: Traced) -> Masks:
    if policy.decay is None:
        return _by_threshold("probabilities")(policy, traced)
    decayed = 0.9 * policy.threshold + 0.1 * np.exp(-policy.decay * traced.steps / traced.max_new_tokens)
    threshold = np.minimum(1.0, decayed).astype(np.float32)
    return {place: traced.probabilities[place] > threshold for place in usable_places(policy, traced)}


def _patient(policy: Patience, traced: Traced) -> Masks:
    masks: Masks = {}
    agreed, before = np.zeros(len(traced), np.int8), None
    for place in usable_places(policy, traced):
        if before is not None:
            agreed = np.where(traced.tokens[place] == traced.tokens[before], agreed + np.int8(1), np.int8(0))
        masks[place], before = agreed >= policy.patience, place
    return masks


def _placed(policy: Position, traced: Traced) -> Masks:
    fall = policy.deepest - policy.shallowest
    depth = policy.deepest - fall * np.minimum(1.0, traced.steps / policy.over)
    return {place: traced.points[place] >= depth for place in usable_places(policy, traced)}


def _drawn(policy: Random, traced: Traced) -> Masks:
    """As `engine.policies.RandomExit` draws: from seed, prompt and step."""
    drawn = np.array(
        [
            _draw(policy.seed, key, step)
            for key, length in zip(traced.prompt_keys.tolist(), traced.lengths.tolist(), strict=True)
            for step in range(length)
        ]
    )
    masks: Masks = {}
    for layer, share in sorted(zip(policy.exit_layers, policy.shares, strict=True)):
        before = drawn
        drawn = drawn - share
        masks[traced.points.index(layer)] = (drawn < 0) & (before >= 0)
    usable = usable_places(policy, traced)
    return {place: mask for place, mask in masks.items() if place in usable}


@lru_cache(maxsize=2_000_000)
def _draw(seed: int, key: int, step: int) -> float:
    return random.Random(f"{seed} {key} {step}").random()


def _told(policy: Oracle, traced: Traced) -> Masks:
    """At the first point where none is right, full depth's included."""
    places = usable_places(policy, traced)
    masks = {place: traced.right[place] for place in places}
    if places:
        hopeless = ~(np.logical_or.reduce(list(masks.values())) | traced.right[-1])
        masks[places[0]] = masks[places[0]] | hopeless
    return masks


_RULES: dict[type[PolicySpec], Callable[[Any, Traced], Masks]] = {
    Full: lambda policy, traced: {},
    Fixed: lambda policy, traced: {
        place: np.ones(len(traced), np.bool_)
        for place in usable_places(policy, traced)
        if traced.points[place] == policy.exit_layer
    },
    Confidence: _confident,
    Margin: _by_threshold("margins"),
    Entropy: _by_threshold("entropies", above=False),
    Patience: _patient,
    StateSimilarity: _by_threshold("similarities"),
    Position: _placed,
    Random: _drawn,
    Oracle: _told,
    Controller: lambda policy, traced: {},  # decided by `_controlled`
    Sec: lambda policy, traced: {},
}
