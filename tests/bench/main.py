"""`make bench`: what the engine's figures stand on. No figure is asserted; they are printed and kept."""

import argparse
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache

import torch

from engine.cache import Span
from engine.cost import Machine
from engine.engine import Engine, Prefilled, Prompt
from engine.heads import full_depth
from engine.record import Decoded
from engine.spec import PolicySpec, policy
from tests.bench.measure import Row, peak_bytes, printed, ratio, seconds, summarise, write
from tests.bench.peer import Peer

PROMPT, NEW = 256, 64
FULL = policy("full")
#: three times round of max_debt exits and the token that pays them, behind the first token
FORCED = 28


@cache
def code() -> str:
    """Real code, enough for 32 prompts."""
    return "\n".join(inspect.getsource(module) for module in (argparse, subprocess, inspect))


def prompts(engine: Engine, rows: int, length: int = PROMPT) -> list[Prompt]:
    """Pieces of real code of one length; where there is not enough, they overlap."""
    ids = engine.tokenizer(code())["input_ids"]
    step = min(length, (len(ids) - length) // rows)
    return [Prompt(ids[row * step : row * step + length]) for row in range(rows)]


def decode(engine: Engine, prefilled: Prefilled, spec: PolicySpec, new: int) -> Decoded:
    """Every row writes `new` tokens: one that ended before would make the figures incomparable."""
    done = engine.decode(prefilled, spec, max_new_tokens=new, ends_with_line=False)
    assert done.decode_tokens == len(prefilled.prompts) * (new - 1), "a row ended early"
    return done


# --- full depth ------------------------------------------------------------------------------------------------------


def against_transformers(engine: Engine, peer: Peer, rows: int, at_least: float) -> list[Row]:
    """Decode and prefill against `generate`'s, same weights, prompts, threads and number of tokens; pairs in turn.

    Apart: what exits can save is in the decode, and a prefill inside its timer would hide it.
    """
    batch = prompts(engine, rows)
    ids = [prompt.token_ids for prompt in batch]

    def ours() -> tuple[float, float]:
        prefilled = engine.prefill(batch, NEW)
        return prefilled.prefill_ns / 1e9, decode(engine, prefilled, FULL, NEW).decode_ns / 1e9

    peer.generate(ids, 4), ours()
    pairs = [(peer.generate(ids, NEW), ours()) for _ in range(5 if rows < 32 else 3)]
    name = f"over transformers generate, batch {rows}"
    return [
        summarise(f"full depth {name}: decode", [a[1] / b[1] for a, b in pairs], "x", at_least=at_least),
        summarise(f"full depth {name}: prefill", [a[0] / b[0] for a, b in pairs], "x"),
        summarise(f"full depth {name}: both", [sum(a) / sum(b) for a, b in pairs], "x"),
    ]


def of_the_bandwidth(engine: Engine) -> Row:
    """A step at batch 1 against the time that reading all weights once takes, measured in between."""
    prefilled = engine.prefill(prompts(engine, 1), NEW)
    weights = engine.stack.n_layers * engine.stack.layer_parameters() + engine.stack.unembedding.numel()
    size = weights * engine.stack.unembedding.element_size()
    data = torch.zeros(2**26)
    decode(engine, prefilled, FULL, NEW)
    shares = []
    for _ in range(7):
        read = min(seconds(data.sum) for _ in range(5)) * size / data.nbytes
        shares.append(read / (decode(engine, prefilled, FULL, NEW).decode_ns / 1e9 / (NEW - 1)))
    return summarise("share of the bandwidth limit, batch 1", shares, "x", at_least=0.65)


def against_plain_loop(engine: Engine, rows: int) -> Row:
    """The dynamic loop with exits off against a loop that knows nothing of exits, rows or ends."""
    prefilled = engine.prefill(prompts(engine, rows), NEW)

    def plain() -> None:
        start = prefilled.start.copy()
        with torch.inference_mode():
            tokens, stack, everyone = start.first.tokens, engine.stack, list(range(rows))
            for position in range(PROMPT, PROMPT + NEW - 1):
                span = Span(everyone, [position] * rows, [1] * rows)
                states = stack.embed(tokens, torch.full((rows,), position))
                states = stack.run(states, span, start.cache, 0, stack.n_layers)
                tokens = full_depth(stack, states).tokens

    return ratio(
        f"plain loop over dynamic loop, exits off, batch {rows}",
        plain,
        lambda: decode(engine, prefilled, FULL, NEW),
        pairs=7,
        at_least=0.97,
    )


def several_tokens(engine: Engine, tokens: int) -> Row:
    """A forward pass of several tokens of one row, each of them unembedded, against a pass of one."""
    prefilled = engine.prefill(prompts(engine, 1), NEW)
    start = prefilled.start.copy()

    def step(count: int) -> Callable[[], None]:
        ids, span = torch.arange(count) + 100, Span([0], [PROMPT], [count])

        def run() -> None:
            with torch.inference_mode():
                for _ in range(8):
                    states = engine.stack.embed(ids, torch.arange(count) + PROMPT)
                    full_depth(engine.stack, engine.stack.run(states, span, start.cache, 0, engine.n_layers))

        return run

    return ratio(f"a step with {tokens} tokens of one row over one", step(tokens), step(1), pairs=9, at_most=1.5)


def lossless(engine: Engine) -> list[Row]:
    """Self-speculation against full depth, batch 1: speed, drafts that were kept, and tokens that differ."""
    prefilled = [engine.prefill([prompt], NEW) for prompt in prompts(engine, 4)]
    spec = policy("self-speculative", exit_layer=engine.exit_points[-1])
    full = [decode(engine, batch, FULL, NEW) for batch in prefilled]
    drafted = [decode(engine, batch, spec, NEW) for batch in prefilled]
    pairs = [
        zip(a.completions[0].token_ids, b.completions[0].token_ids, strict=True)
        for a, b in zip(full, drafted, strict=True)
    ]
    differ = sum(x != y for pair in pairs for x, y in pair)
    kept = sum(d.drafts_kept for d in drafted) / max(1, sum(d.drafted for d in drafted))
    name = f"self-speculative at {engine.exit_points[-1]}, batch 1"
    return [
        ratio(
            f"{name}: speedup",
            lambda: [decode(engine, batch, FULL, NEW) for batch in prefilled],
            lambda: [decode(engine, batch, spec, NEW) for batch in prefilled],
            pairs=5,
        ),
        Row(f"{name}: drafts kept", kept, kept, kept, "x"),
        Row(f"{name}: tokens that differ from full depth", differ, differ, differ, "tokens"),
    ]


# --- exits -----------------------------------------------------------------------------------------------------------


def forced_exits(engine: Engine) -> Iterator[Row]:
    """Each exit point, both ways of paying, batches and contexts."""
    for context in (128, 1024):
        for batch in (1, 4, 16):
            prefilled = engine.prefill(prompts(engine, batch, context), FORCED)
            wanted = {1: 0.90, 16: 0.85}.get(batch)
            yield from forced(engine, prefilled, f"batch {batch}, context {context}", wanted)


def forced(engine: Engine, prefilled: Prefilled, where: str, at_least: float | None) -> Iterator[Row]:
    """Every token leaves at one exit point: measured speedup, and how much of the ideal one it is.

    Full depth and all exits in turn, three times after a warm-up; each is held against the full depth of its round.
    """
    specs = {
        f"exit at {layer}, {kv}, {where}": policy("fixed", exit_layer=layer, kv=kv)
        for layer in engine.exit_points
        for kv in ("copy", "recompute")
    }
    measured: dict[str, list[float]] = {name: [] for name in specs}
    ideal = {}
    for counted in (False, True, True, True):
        full = decode(engine, prefilled, FULL, FORCED)
        for name, spec in specs.items():
            done = decode(engine, prefilled, spec, FORCED)
            ideal[name] = full.ideal_ns / done.ideal_ns
            if counted:
                measured[name].append(full.decode_ns / done.decode_ns)
    for name, speedups in measured.items():
        yield summarise(f"{name}: speedup (ideal {ideal[name]:.2f})", speedups, "x")
        shares = [speedup / ideal[name] for speedup in speedups]
        yield summarise(f"{name}: of the ideal", shares, "x", at_least=at_least)


def of_full_ideal(engine: Engine, batch: int) -> Row:
    """The cost model's time for full depth over the measured one: how near the kernels are to the machine's limits."""
    prefilled = engine.prefill(prompts(engine, batch), NEW)
    decode(engine, prefilled, FULL, NEW)
    done = [decode(engine, prefilled, FULL, NEW) for _ in range(3)]
    return summarise(
        f"full depth: ideal over measured time, batch {batch}", [d.ideal_ns / d.decode_ns for d in done], "x"
    )


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_memory() -> Row:
    """What a process with the engine takes at its peak beyond one without a model, over weights and cache."""
    answer = subprocess.run(
        [sys.executable, "-m", "tests.bench.main", "--memory"], capture_output=True, text=True, check=True
    )
    value = float(answer.stdout.split()[-1])
    return Row("peak memory over weights and the two caches, batch 8", value, value, value, "x", at_most=1.3)


def measure_peak() -> float:
    """In this process: load, prefill, decode, as every worker does but the first, which measures the machine."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401 - code is no memory of a model

    before = peak_bytes()
    own = Engine("smollm2-135m", "smollm2-135m")
    own.machine = Machine(bandwidth=1e10, peak=1e11)
    prefilled = own.prefill(prompts(own, 8), NEW)
    decode(own, prefilled, FULL, NEW)
    weights = own.stack.n_layers * own.stack.layer_parameters() + own.stack.unembedding.numel()
    cache = 2 * 2 * prefilled.start.cache.keys.numel()  # keys and values, of the prefill and of the policy's copy
    size = own.stack.unembedding.element_size()
    return (peak_bytes() - before) / ((weights + cache) * size)


def main() -> None:
    """Print the table and write it to build/bench/engine.json."""
    if sys.argv[1:] == ["--memory"]:
        print(measure_peak())
        return
    engine = Engine("smollm2-135m", "smollm2-135m")
    print(f"{engine.device_class}; prompts of {PROMPT} tokens, {NEW} new")
    for shape, kernels in engine.kernels.items():
        print(f"  kernels for {shape}: {' '.join(kernels)}")
    write("engine", printed(everything(engine)))


def everything(engine: Engine) -> Iterator[Row]:
    """Every row of the table, in its order."""
    with Peer(engine.facts.folder, engine.threads) as peer:
        for batch, wanted in ((1, 1.8), (8, 2.0), (32, 1.6)):
            yield from against_transformers(engine, peer, batch, wanted)
    yield of_the_bandwidth(engine)
    yield from (of_full_ideal(engine, batch) for batch in (1, 8, 32))
    yield several_tokens(engine, 4)
    yield from (against_plain_loop(engine, batch) for batch in (1, 8))
    yield from lossless(engine)
    yield from forced_exits(engine)
    yield peak_memory()


if __name__ == "__main__":
    main()
