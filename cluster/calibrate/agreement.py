"""The promise of agreement: how often a completion may differ from full depth's at all.

On a trace of full depth's own completions, under `recompute`, a replay decides what a run decides up to the first token
that differs: whether one does is exact, and no run is needed. Learn-then-Test (Angelopoulos et al. 2021) over chains:
policies that differ in one threshold only, from the safest on, each chain with its share of what may go wrong; which
policies make a chain, and in what order, does not depend on the trace.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from cluster.calibrate.found import Calibrated, Candidate, fastest, is_faster, promised
from cluster.calibrate.pvalues import fewest_groups, groups_for_agreement, hoeffding_bentkus
from cluster.grids import ReplaySpec, expand
from cluster.replays import ReplayedPolicy, check_made_for, replay_trace
from cluster.traced import Trace
from db.traces import traced_tokens
from engine.errors import BadInput
from engine.replay.decide import Oracle, check_replayable, decide
from engine.replay.traced import Array, Traced
from engine.spec import Full, PolicySpec, Sec

#: by kind the option that a chain goes along, and whether its largest value is the safest
_AXES = {
    "confidence": ("threshold", True),
    "margin": ("threshold", True),
    "state-similarity": ("threshold", True),
    "entropy": ("threshold", False),
    "patience": ("patience", True),
    "controller": ("exit", True),
    "fixed": ("exit_layer", True),
}


def default_grid(has_controller: bool) -> list[Any]:
    """Few chains, for each costs some confidence; a controller that never stops, for a stop always differs."""
    steps = {"from": 0.5, "to": 1.0, "steps": 101}
    grid: list[Any] = [{"confidence": {"threshold": steps}}]
    return grid + [{"controller": {"exit": steps, "stop": 1.0}}] * has_controller


def calibrate_agreement(
    trace: Trace,
    asked: ReplaySpec,
    *,
    max_disagree: float,
    confidence: float,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> Calibrated:
    """The fastest of the policies under which completions differ from full depth's in at most this share.

    Raises `BadInput` where the trace is not of full depth, a policy cannot be promised anything, or there are too few
    source groups for any.
    """
    policies = _checked(trace, asked)
    chains = chains_of(policies)
    level = (1 - confidence) / len(chains)
    samples, losses = losses_of(trace, policies, wrong_tokens)
    check_enough(samples, "agreement", max_disagree, level)
    figures = replay_trace(trace, ReplaySpec(policies=[one.dump() for one in policies]), on_progress=on_progress)
    p_values, kept = along_chains(losses, chains, max_disagree, level)
    tried = [
        Candidate(
            row.policy,
            row.spec,
            float(own.mean()),
            p_values.get(place),
            place in kept,
            speedup := speedup_of(row, trace.pinned.n_layers),
            is_faster(speedup),
            groups_for_agreement(float(own.mean()), max_disagree, level),
        )
        for place, (row, own) in enumerate(zip(figures.policies, losses, strict=True))
    ]
    chosen, closest = fastest(tried)
    made = Calibrated(
        job_id=trace.run.job_id,
        live_job=None,
        benchmark=trace.run.benchmark,
        kind="agreement",
        bound=max_disagree,
        confidence=confidence,
        groups=len(samples),
        samples=int(samples.sum()),
        tried=tried,
        chosen=chosen,
        closest=closest,
        promise=None,
    )
    if chosen is None:
        return made
    return promised(
        made, trace, level=level, test="hoeffding-bentkus", tested=len(chains), speedup_ideal=chosen.speedup
    )


def chains_of(policies: Sequence[PolicySpec]) -> list[list[int]]:
    """Places of the policies that differ in one threshold only, from the safest on."""
    chains: dict[Any, list[tuple[float, int]]] = {}
    for place, policy in enumerate(policies):
        options = policy.model_dump(exclude={"name"})
        axis, high_is_safe = _AXES.get(policy.kind, (None, True))
        value = 0.0 if axis is None else float(options.pop(axis))
        key = (policy.kind, repr(sorted(options.items())))
        chains.setdefault(key, []).append((-value if high_is_safe else value, place))
    return [[place for _, place in sorted(chain)] for chain in chains.values()]


def along_chains(
    losses: Array, chains: Sequence[Sequence[int]], bound: float, level: float
) -> tuple[dict[int, float], set[int]]:
    """The p-value of every policy that was reached, and those that keep the promise.

    losses: [policies, groups]. Each chain is gone along until one fails, at this level throughout.
    """
    p_values: dict[int, float] = {}
    kept: set[int] = set()
    for chain in chains:
        for place in chain:
            p_values[place] = hoeffding_bentkus(float(losses[place].mean()), losses.shape[1], bound)
            if p_values[place] > level:
                break
            kept.add(place)
    return p_values, kept


def wrong_tokens(policy: PolicySpec, traced: Traced, right: Array | None = None) -> Array:
    """[n] tokens with which a completion parts from the target, a stop being one.

    right: [p, n] what counts as no parting instead.
    """
    decisions = decide(policy, traced)
    wrong = ~(traced.right if right is None else right)[decisions.places, np.arange(len(traced))]
    if decisions.stops is not None and decisions.behind is not None:
        wrong = (wrong & ~decisions.behind) | decisions.stops
    return np.asarray(wrong)


def losses_of(
    trace: Trace, policies: Sequence[PolicySpec], wrong: Callable[[PolicySpec, Traced], Array]
) -> tuple[Array, Array]:
    """Of the groups that have samples, how many; and [policies, groups] the share of them in which a token is wrong."""
    return group_losses(trace.pieces(), policies, wrong, groups=len(trace.groups))


def group_losses(
    pieces: Iterable[Traced],
    policies: Sequence[PolicySpec],
    wrong: Callable[[PolicySpec, Traced], Array],
    *,
    groups: int,
) -> tuple[Array, Array]:
    """As `losses_of`, from pieces."""
    samples, differ = np.zeros(groups), np.zeros((len(policies), groups))
    for piece in pieces:
        samples += np.bincount(piece.groups, minlength=groups)
        for place, policy in enumerate(policies):
            parted = np.logical_or.reduceat(wrong(policy, piece), piece.starts)
            differ[place] += np.bincount(piece.groups, parted, groups)
    present = samples > 0
    return samples[present], differ[:, present] / samples[present]


def check_enough(samples: Array, kind: str, bound: float, level: float) -> None:
    """Whether so many groups could show anything. Raises `BadInput`."""
    needed = fewest_groups(kind, bound, level)
    if len(samples) < needed:
        option = "max-disagree" if kind == "agreement" else "max-loss"
        raise BadInput(
            f"{option} is {bound:g}, and {len(samples):,} source groups cannot promise that even if none has any loss; "
            f"it takes {needed:,} to be tested on: trace more, or ask for a larger {option} or less confidence."
        )


def _checked(trace: Trace, asked: ReplaySpec) -> list[PolicySpec]:
    """The policies that are asked for, under `recompute`. Raises `BadInput`."""
    check_made_for(trace, asked)
    if trace.target != "full":
        raise BadInput(
            f"job {trace.run.job_id} is a trace of references, and agreement is with full depth's own completions; "
            "make one with `shortstop trace SPEC --target full`."
        )
    found = []
    for policy in expand(asked.policies, traced_tokens(trace.db, trace.run.id), len(trace.points)):
        if isinstance(policy, Sec | Oracle | Full):
            remedy = "give `controller` instead" if isinstance(policy, Sec) else "leave it out"
            raise BadInput(f"policy {policy.kind!r}: agreement is promised under kv: recompute only; {remedy}.")
        check_replayable(policy, trace.pinned.exit_points, trace.pinned.n_layers, trace.pinned.controller)
        found.append(policy.model_copy(update={"kv": "recompute"}))
    return list(dict.fromkeys(found))


def speedup_of(row: ReplayedPolicy, n_layers: int) -> float:
    """Ideal, and where no cost model is known that of depth."""
    ideal = row.figures.get("speedup_ideal")
    if ideal is not None and ideal.value is not None:
        return ideal.value
    return n_layers / (row.figures["mean_exit_layer"].value or n_layers)
