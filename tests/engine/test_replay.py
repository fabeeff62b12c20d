"""Replay decides what the engine decides, costs what it costs, and knows its limits."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from teacher_forced import forced, traced
from test_trace import random_targets
from tiny_models import MACHINE, POINTS, random_prompts

from engine.cost import cost
from engine.engine import Engine, Prompt
from engine.errors import BadInput
from engine.record import Decision
from engine.replay.decide import Oracle, check_replayable, decide
from engine.replay.figures import FIGURES, SUMS, figures, pareto_front
from engine.replay.ideal import CostModel, Steps
from engine.replay.replay import replay
from engine.replay.traced import Traced
from engine.spec import PolicySpec, policy

#: a signal that is nearer to its threshold than this may fall on either side
TIE = 1e-5
LENGTHS = [14, 9, 3, 12]

unit = st.floats(0, 1)
asked = st.none() | st.floats(0, 0.7)
options = st.fixed_dictionaries(
    {
        "max_debt": st.integers(1, 4),
        "full_first": st.integers(1, 3),
        "max_exits_in_row": st.none() | st.integers(1, 3),
        "min_layer": st.none() | st.integers(1, 4),
    }
)
kinds = st.one_of(
    st.tuples(
        st.just("confidence"),
        st.fixed_dictionaries({"threshold": unit, "decay": st.none() | st.floats(0.1, 9), "ask_above": asked}),
    ),
    st.tuples(st.just("margin"), st.fixed_dictionaries({"threshold": unit, "ask_above": asked})),
    st.tuples(st.just("entropy"), st.fixed_dictionaries({"threshold": st.floats(0, 5), "ask_above": asked})),
    st.tuples(st.just("patience"), st.fixed_dictionaries({"patience": st.just(1)})),
    st.tuples(st.just("state-similarity"), st.fixed_dictionaries({"threshold": unit})),
    st.tuples(st.just("position"), st.just({"deepest": 6, "shallowest": 1, "over": 5})),
    st.tuples(st.just("fixed"), st.just({"exit_layer": 4})),
    st.tuples(st.just("random"), st.just({"exit_layers": [4, 5], "shares": [0.4, 0.3], "seed": 2})),
    st.tuples(st.just("controller"), st.fixed_dictionaries({"exit": unit, "stop": unit})),
    st.tuples(st.just("full"), st.just({})),
)


@st.composite
def policies(draw: st.DrawFn) -> PolicySpec:
    kind, own = draw(kinds)
    return policy(kind, kv="recompute", **own, **draw(options))


Piece = tuple[Engine, list[Prompt], list[list[int]], Traced]


@pytest.fixture(scope="module")
def piece(tiny_engine: Callable[..., Engine]) -> Callable[[int], Piece]:
    """A batch of random prompts and targets, and its trace."""

    @cache
    def made(seed: int) -> Piece:
        controller = "calibrated" if seed >= 4 else "sec"  # the one that looks at the token before
        engine = tiny_engine("llama", head="lens", controller=controller)
        prompts = random_prompts(len(LENGTHS), seed=seed, shortest=2, longest=20)
        targets = random_targets(LENGTHS, seed)
        return engine, prompts, targets, traced(engine, prompts, targets, engine.trace(prompts, targets).traces)

    return made


def _nearness(spec: PolicySpec, traced: Traced, token: int) -> float:
    """How near the token's signals come to what decides."""
    column = {"confidence": "probabilities", "margin": "margins", "entropy": "entropies"}
    column["state-similarity"] = "similarities"
    if spec.kind in column:
        step, threshold = int(traced.steps[token]), spec.threshold
        if getattr(spec, "decay", None):
            threshold = min(1.0, 0.9 * threshold + 0.1 * np.exp(-spec.decay * step / traced.max_new_tokens))
        near = float(np.abs(getattr(traced, column[spec.kind])[:, token] - threshold).min())
        if getattr(spec, "ask_above", None) is not None:
            near = min(near, float(np.abs(traced.controller[:, 1, token] - spec.ask_above).min()))
        return near
    if spec.kind == "patience":
        return float(traced.margins[:, token].min())
    if spec.kind == "controller":
        both = [traced] if traced.after_exit is None else [traced, traced.behind_exits]
        ordered = np.sort(np.concatenate([one.controller[:, :, token] for one in both]), axis=1)
        gaps = [ordered[:, 2] - spec.exit, ordered[:, 2] - spec.stop, ordered[:, 2] - ordered[:, 1]]
        return float(np.abs(gaps).min())
    return np.inf


@settings(max_examples=120, deadline=None)
@given(spec=policies(), seed=st.integers(0, 5))
def test_replay_decides_what_a_teacher_forced_decode_decides(
    piece: Callable[[int], Piece], spec: PolicySpec, seed: int
) -> None:
    """Protects replay's promise: under `recompute` its decisions are the engine's up to the stop, but for ties."""
    engine, prompts, targets, trace = piece(seed)
    if spec.kind == "fixed" and (spec.min_layer or 0) > 4:
        return
    if spec.kind == "patience" and len([p for p in POINTS if (spec.min_layer or 0) <= p < 6]) < 2:
        return
    decoding, told = forced(engine, prompts, targets, spec), decide(spec, trace)
    ties = 0
    for row, (begin, record) in enumerate(zip(trace.starts.tolist(), decoding.records, strict=True)):
        for step in range(len(record)):
            token = begin + step
            stops = told.stops is not None and bool(told.stops[token])
            seen = (int(record.exit_layers[step]), record.decisions[step] == Decision.STOP)
            if seen != (trace.points[told.places[token]], stops):
                assert _nearness(spec, trace, token) < TIE, f"{spec}: row {row}, step {step}"
                ties += 1
                break  # what follows may hang on it
            if told.behind is not None:
                assert not told.behind[token]
        else:
            stopped = record.decisions[-1] == Decision.STOP
            assert len(record) == len(targets[row]) or stopped
    assert ties <= 1


@pytest.mark.parametrize("kv", ["copy", "recompute", "mask"])
@pytest.mark.parametrize(
    "spec",
    [
        ("full", {}),
        ("fixed", {"exit_layer": 2}),
        ("fixed", {"exit_layer": 4, "max_exits_in_row": 2, "full_first": 3}),
        ("position", {"deepest": 6, "shallowest": 1, "over": 5}),
        ("random", {"exit_layers": [1, 4, 5], "shares": [0.3, 0.3, 0.2]}),
        ("confidence", {"threshold": 0.0, "max_exits_in_row": 1}),
        ("patience", {"patience": 1}),
    ],
)
def test_ideal_cost_is_the_engines(piece: Callable[[int], Piece], kv: str, spec: tuple[str, dict[str, object]]) -> None:
    """Protects `speedup_ideal`: replay's price of a decode is what the engine counted while it decoded the same."""
    engine, prompts, targets, trace = piece(1)
    asked = policy(spec[0], kv=kv, **spec[1])
    decoding, told = forced(engine, prompts, targets, asked), decide(asked, trace)
    layers = np.concatenate([record.exit_layers for record in decoding.records])
    if kv == "copy" and not np.array_equal(layers, trace.layers[told.places]):
        pytest.skip("copied keys led to other decisions")
    assert np.array_equal(layers, trace.layers[told.places])
    steps = Steps(trace, cost_model(engine))
    # the engine rounds down to whole nanoseconds
    assert steps.cost(asked, told).sum() == pytest.approx(
        cost(decoding.work, engine.stack.shape, MACHINE).ideal_ns, abs=1
    )


@pytest.mark.parametrize(
    "spec",
    [
        ("confidence", {"threshold": 0.1, "ask_above": 0.35, "max_exits_in_row": 2}),
        ("margin", {"threshold": 0.02, "ask_above": 0.3, "full_first": 2}),
    ],
)
def test_ideal_cost_where_the_controller_is_asked_first(
    piece: Callable[[int], Piece], spec: tuple[str, dict[str, object]]
) -> None:
    """The same where the controller says which heads are worth asking: its word hangs on exact keys and values."""
    test_ideal_cost_is_the_engines(piece, "recompute", spec)


def cost_model(engine: Engine) -> CostModel:
    return CostModel(engine.stack.shape, tuple(map(engine.heads.parameters, POINTS)), MACHINE)


@settings(max_examples=150, deadline=None)
@given(spec=policies(), seed=st.integers(0, 3))
def test_a_right_token_ran_at_least_the_oracles_layers(
    piece: Callable[[int], Piece], spec: PolicySpec, seed: int
) -> None:
    """Protects the oracle: nobody is right with fewer layers."""
    *_, trace = piece(seed)
    told, oracle = decide(spec, trace), decide(Oracle(), trace)
    right = trace.right[told.places, np.arange(len(trace))]
    if told.written is not None:
        right &= told.written
    assert (trace.layers[told.places] >= trace.layers[oracle.places])[right].all()
    hopeless = ~trace.right.any(0) & (trace.steps > 0)
    assert (oracle.places[hopeless] == 0).all()


def test_figures_by_hand(piece: Callable[[int], Piece]) -> None:
    """Protects the sums: shares, depth, stops and their lift, counted one token after another."""
    engine, _, _, trace = piece(2)
    specs = [policy("full"), policy("confidence", threshold=0.3), policy("controller", exit=0.4, stop=0.4), Oracle()]
    found = replay(lambda: [trace], specs, groups=len(LENGTHS), model=cost_model(engine))
    for place, spec in enumerate(specs):
        told = decide(spec, trace)
        written = np.ones(len(trace), bool) if told.written is None else told.written
        own = [t for t in range(len(trace)) if written[t]]
        right = sum(int(trace.tokens[told.places[t], t] == trace.targets[t]) for t in own)
        agree = sum(int(trace.tokens[told.places[t], t] == trace.tokens[-1, t]) for t in own)
        values = {name: float(figure.values[place]) for name, figure in found.figures.items()}
        assert values["tokens_right"] == pytest.approx(right / len(own))
        assert values["agreement"] == pytest.approx(agree / len(own))
        assert values["mean_exit_layer"] == pytest.approx(np.mean([trace.points[told.places[t]] for t in own]))
        stopped = [] if told.stops is None else np.unique(trace.sample[told.stops]).tolist()
        wrong = [s for s in range(len(LENGTHS)) if (~trace.right[-1][trace.sample == s]).any()]
        assert values["stop_share"] == len(stopped) / len(LENGTHS)
        assert values["stop_base_rate"] == len(wrong) / len(LENGTHS)
        assert found.stopped[place] == len(stopped)
        if stopped:
            assert values["stop_precision"] == len(set(stopped) & set(wrong)) / len(stopped)
    assert found.figures["speedup_ideal"].values[0] == pytest.approx(1)
    assert found.front[:3].any()
    assert not found.front[3]  # the oracle leaves a front to those that can be run


def test_pieces_and_goes_do_not_matter(piece: Callable[[int], Piece], monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects streaming: the same figures however the trace is cut, and however few policies fit at once."""
    engine, prompts, targets, whole = piece(3)
    parts = []
    for place in range(len(prompts)):
        traces = engine.trace(prompts[place : place + 1], targets[place : place + 1]).traces
        part = traced(engine, prompts[place : place + 1], targets[place : place + 1], traces)
        parts.append(part)
    alone = [
        Traced(**{**{name: getattr(part, name) for name in Traced.__dataclass_fields__}, "groups": np.array([place]),
                  "batches": np.array([place]), "max_new_tokens": max(LENGTHS)})
        for place, part in enumerate(parts)
    ]  # fmt: skip
    apart = Traced(
        **{**{name: getattr(whole, name) for name in Traced.__dataclass_fields__}, "batches": np.arange(len(prompts))}
    )
    specs = [policy("confidence", threshold=t / 10) for t in range(10)] + [policy("controller", exit=0.5, stop=0.5)]
    model = cost_model(engine)
    once = replay(lambda: [apart], specs, groups=len(prompts), model=model)
    monkeypatch.setattr("engine.replay.replay._SUM_BYTES", 3 * 8 * len(SUMS) * len(prompts))
    often = replay(lambda: alone, specs, groups=len(prompts), model=model)
    assert once.figures.keys() == often.figures.keys() == FIGURES.keys()
    for name in FIGURES:
        assert once.figures[name].values == pytest.approx(often.figures[name].values, rel=1e-4, nan_ok=True), name
    assert np.array_equal(once.front, often.front)


def test_intervals_are_those_of_a_bootstrap_over_groups() -> None:
    """Protects the intervals: as wide as drawing whole groups anew makes them, and none for too few groups."""
    draw = np.random.default_rng(4)
    sums = draw.uniform(5, 9, (1, 300, len(SUMS)))
    sums[0, :, SUMS.index("right")] = sums[0, :, SUMS.index("written")] * draw.beta(4, 2, 300)
    found = figures(sums)
    for name, powers in FIGURES.items():
        chosen = draw.integers(0, 300, (4000, 300))
        value = np.ones(4000)
        for one, power in powers.items():
            value *= sums[0, :, SUMS.index(one)][chosen].sum(1) ** float(power)
        low, high = np.percentile(value, [2.5, 97.5])
        figure = found[name]
        assert figure.highs[0] - figure.lows[0] == pytest.approx(high - low, rel=0.1) or figure.highs[0] == 1, name
    assert np.isnan(figures(sums[:, :5])["tokens_right"].lows).all()
    absent = np.concatenate([sums, np.zeros((1, 40, len(SUMS)))], axis=1)
    assert figures(absent)["agreement"].lows == pytest.approx(found["agreement"].lows)
    nothing = figures(np.zeros((1, 8, len(SUMS))))
    assert np.isnan(nothing["stop_precision"].values).all()


def test_pareto_front() -> None:
    """Protects the front: no point on it is beaten in one without being worse in the other."""
    speeds = np.array([1.0, 2.0, 1.5, 1.5, 0.5, np.nan, 2.0])
    qualities = np.array([0.9, 0.5, 0.8, 0.7, 0.9, 1.0, 0.5])
    assert pareto_front(speeds, qualities).tolist() == [True, True, True, False, False, False, True]


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (policy("self-speculative", exit_layer=4), "rolled back"),
        (policy("confidence", threshold=0.5, kv="recompute", verify=True), "rolled back"),
        (policy("static", layers=[2]), "'static' cannot be replayed"),
        (policy("fixed", exit_layer=3), "exit_layer is 3, which is no exit point"),
        (policy("random", exit_layers=[3], shares=[0.1]), "exit_layers is 3"),
        (policy("patience", patience=9), "patience is 9"),
        (policy("controller", exit=0.5, stop=0.5), "needs the column controller"),
        (policy("confidence", threshold=0.5, ask_above=0.5), "with ask_above needs the column controller"),
        (policy("fixed", exit_layer=4, preview=9), "preview is 9, and a trace does not hold"),
    ],
)
def test_what_a_trace_cannot_answer_is_refused(spec: PolicySpec, sentence: str) -> None:
    """Protects users from figures of something else than they asked for."""
    with pytest.raises(BadInput, match=sentence):
        check_replayable(spec, (1, 2, 4, 5), 6, has_controller=False)
