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
    HeadPolicy,
    Margin,
    Patience,
    PolicySpec,
    Position,
    Random,
    Sec,
    StateSimilarity,
)

#: by place: which tokens leave there
Masks = dict[int, Array]
Rule = Callable[[Any, Traced], Array]


class Oracle(PolicySpec):
    """Leave at the first exit point equal to the target, else at the first: what no policy can know (replay only)."""

    kind = "oracle"
    rule = "engine.replay.decide:Oracle"


@dataclass(frozen=True)
class Decisions:
    """What a policy does with each of n tokens."""

    places: Array  #: [n] int8, place of the point where the token was decided; full depth is the last one
    stops: Array | None = None  #: [n] whether it was given up there; None: this policy never stops
    behind: Array | None = None  #: [n] whether it comes after a stop, and never was
    #: [n] whether it could not leave: a first token, or behind too many that had left; None: only those of step 0
    forced: Array | None = None

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
    if policy.preview is not None:
        raise BadInput(
            f"policy {policy.kind!r}: preview is {policy.preview}, and a trace does not hold what a preview overlooks; "
            "run it, or leave preview out."
        )
    if policy.asks_controller and not has_controller:
        field = "" if policy.needs == "controller" else " with ask_above"
        raise BadInput(
            f"policy {policy.kind!r}{field} needs the column controller, and the trace has none: its exits have no "
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
    if isinstance(policy, Controller):
        return _controlled(policy, traced)
    wants = _RULES[type(policy)](policy, traced)
    wants[_firsts(policy, traced)] = traced.last
    held_back = _held_back(policy, wants, traced.last)
    if held_back is not None:
        wants[held_back] = traced.last
    return Decisions(wants, forced=_forced(policy, traced, held_back))


def usable_places(policy: PolicySpec, traced: Traced) -> range:
    """Places of the points at which a token may leave: neighbours, up to the one before full depth."""
    return range(traced.last - len(usable_points(policy, traced.exit_points, traced.n_layers)), traced.last)


def _firsts(policy: PolicySpec, traced: Traced) -> Array:
    """The tokens that run at full depth because they are a completion's first: places, or a mask."""
    return traced.starts if policy.full_first == 1 else traced.steps < policy.full_first


def _held_back(policy: PolicySpec, places: Array, last: int) -> Array | None:
    """[n] tokens that want to leave before full depth and may not, for too many before them have; None: none."""
    most = _most_in_row(policy)
    if most is None:
        return None
    wants = places < last
    # A sample's first token never wants to, so no run goes from one sample into the next.
    here = np.arange(len(wants))
    stayed = np.maximum.accumulate(np.where(wants, -1, here))
    held_back = wants & ((here - stayed) % (most + 1) == 0)
    return held_back if held_back.any() else None


def _most_in_row(policy: PolicySpec) -> int | None:
    """Tokens that may leave one after another."""
    limits = [policy.max_exits_in_row, policy.max_debt if policy.kv == "recompute" else None]
    return min((limit for limit in limits if limit is not None), default=None)


def _forced(policy: PolicySpec, traced: Traced, held_back: Array | None) -> Array | None:
    if policy.full_first == 1 and held_back is None:
        return None
    first = traced.steps < policy.full_first
    return first if held_back is None else first | held_back


def _controlled(policy: Controller, traced: Traced) -> Decisions:
    """SEC's rule: the likeliest class acts where its probability exceeds its threshold. Behind the last layer it can
    only stop; a token that may not leave can still be given up.
    """
    last = traced.last
    leaves, gives_up = _wishes(policy, traced)
    if traced.after_exit is not None:
        leaves, gives_up = _one_behind_another(policy, traced, (leaves, gives_up))
    held_back = _held_back(policy, leaves, last)
    if held_back is not None:
        leaves[held_back] = last
    stops = (gives_up <= last) & (leaves == last)
    behind = _behind_a_stop(stops, traced)
    taken = np.where(stops, gives_up, leaves)
    return Decisions(taken, stops & ~behind, behind, _forced(policy, traced, held_back))


def _wishes(policy: Controller, traced: Traced) -> tuple[Array, Array]:
    """[n] each: the place where a token wants to leave, `last` where it does not; where to give up, else behind it."""
    last, places = traced.last, usable_places(policy, traced)
    leaves = _first_place(traced, "exits", places, policy.exit)
    gives_up = _first_place(traced, "stops", places, policy.stop)
    if traced.n_layers in traced.exit_points:
        gives_up[(gives_up == last) & ~(traced.stops[last] > policy.stop)] = last + 1
    else:
        gives_up[gives_up == last] = last + 1
    first = _firsts(policy, traced)
    leaves[first], gives_up[first] = last, last + 1
    leaves[gives_up < leaves] = last
    return leaves, gives_up


def _one_behind_another(policy: Controller, traced: Traced, plain: tuple[Array, Array]) -> tuple[Array, Array]:
    """`_wishes` of a controller that looks at whether the token before left: step by step, all samples at once.

    plain: as if none had left.
    """
    behind, most = _wishes(policy, traced.behind_exits), _most_in_row(policy)
    leaves, gives_up = plain[0].copy(), plain[1].copy()
    in_row = np.zeros(len(traced.starts), np.int64)  # tokens of each sample that left, one after another, up to here
    for step in range(int(traced.lengths.max())):
        going = traced.lengths > step
        here, left = traced.starts[going] + step, in_row[going] > 0
        leaves[here] = np.where(left, behind[0][here], plain[0][here])
        gives_up[here] = np.where(left, behind[1][here], plain[1][here])
        leaving = leaves[here] < traced.last
        if most is not None:
            leaving &= in_row[going] < most
        in_row[going] = np.where(leaving, in_row[going] + 1, 0)
    return leaves, gives_up


def _behind_a_stop(stops: Array, traced: Traced) -> Array:
    """[n] tokens that come after a stop in their sample."""
    before = np.cumsum(stops) - stops
    return np.asarray(before > np.repeat(before[traced.starts], traced.lengths))


def _first_place(traced: Traced, column: str, places: range, threshold: Any, sign: int = 1) -> Array:
    """[n] the first of these places at which a signal exceeds its threshold; full depth where none does.

    A token goes on as often as the highest of the signal so far has not exceeded the threshold.
    """
    first = np.full(len(traced), places.start, np.int8)
    for highest in traced.so_far(column, places, sign):
        first += (highest <= threshold).view(np.int8)
    return first


def _by_threshold(column: str) -> Rule:
    sign = -1 if column == "entropies" else 1  # the lower the surer

    def places(policy: Any, traced: Traced) -> Array:
        return _first_above(policy, traced, column, sign * policy.threshold, sign)

    return places


def _first_above(policy: PolicySpec, traced: Traced, column: str, threshold: Any, sign: int = 1) -> Array:
    """[n] the first place at which the head is asked and its signal exceeds the threshold."""
    usable = usable_places(policy, traced)
    if not isinstance(policy, HeadPolicy) or policy.ask_above is None:
        return _first_place(traced, column, usable, threshold, sign)
    signal, asked = getattr(traced, column), asked_at(policy, traced)
    return _first({place: asked[place] & (sign * signal[place] > threshold) for place in usable}, traced)


def asked_at(policy: HeadPolicy, traced: Traced) -> Array:
    """[p, n] where the controller lets the head be asked, under `ask_above`."""
    return np.asarray(traced.controller[:, 1] > np.float32(policy.ask_above or 0))


def _confident(policy: Confidence, traced: Traced) -> Array:
    if policy.decay is None:
        return _by_threshold("probabilities")(policy, traced)
    decayed = 0.9 * policy.threshold + 0.1 * np.exp(-policy.decay * traced.steps / traced.max_new_tokens)
    threshold = np.minimum(1.0, decayed).astype(np.float32)
    return _first_above(policy, traced, "probabilities", threshold)


def _first(masks: Masks, traced: Traced) -> Array:
    """[n] the first place at which a token is in its mask."""
    first = np.full(len(traced), traced.last, np.int8)
    for place in sorted(masks, reverse=True):
        np.copyto(first, np.int8(place), where=masks[place])
    return first


def _patient(policy: Patience, traced: Traced) -> Array:
    masks: Masks = {}
    agreed, before = np.zeros(len(traced), np.int8), None
    for place in usable_places(policy, traced):
        if before is not None:
            agreed = np.where(traced.tokens[place] == traced.tokens[before], agreed + np.int8(1), np.int8(0))
        masks[place], before = agreed >= policy.patience, place
    return _first(masks, traced)


def _placed(policy: Position, traced: Traced) -> Array:
    fall = policy.deepest - policy.shallowest
    depth = policy.deepest - fall * np.minimum(1.0, traced.steps / policy.over)
    return _first({place: traced.points[place] >= depth for place in usable_places(policy, traced)}, traced)


def _drawn(policy: Random, traced: Traced) -> Array:
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
    return _first({place: mask for place, mask in masks.items() if place in usable}, traced)


@lru_cache(maxsize=2_000_000)
def _draw(seed: int, key: int, step: int) -> float:
    return random.Random(f"{seed} {key} {step}").random()


def _told(policy: Oracle, traced: Traced) -> Array:
    """At the first point where none is right, full depth's included."""
    places = usable_places(policy, traced)
    masks = {place: traced.right[place] for place in places}
    if places:
        hopeless = ~(np.logical_or.reduce(list(masks.values())) | traced.right[-1])
        masks[places[0]] = masks[places[0]] | hopeless
    return _first(masks, traced)


def _full(policy: PolicySpec, traced: Traced) -> Array:
    return np.full(len(traced), traced.last, np.int8)


def _fixed(policy: Fixed, traced: Traced) -> Array:
    return np.full(len(traced), traced.points.index(policy.exit_layer), np.int8)


#: for each kind, where tokens want to leave, whatever holds them back: [n] places, last where they do not
_RULES: dict[type[PolicySpec], Rule] = {
    Full: _full,
    Fixed: _fixed,
    Confidence: _confident,
    Margin: _by_threshold("margins"),
    Entropy: _by_threshold("entropies"),
    Patience: _patient,
    StateSimilarity: _by_threshold("similarities"),
    Position: _placed,
    Random: _drawn,
    Oracle: _told,
    Controller: _full,  # decided by `_controlled`
    Sec: _full,
}
