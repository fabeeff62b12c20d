"""`make bench`: what the engine's figures stand on. Nothing here asserts; it prints and keeps what it saw."""

import torch

from engine.engine import Engine, Prefilled, Prompt
from engine.loading import load_model
from engine.spec import PolicySpec, policy
from tests.bench.measure import Row, ratio, write

PROMPT, NEW = 256, 32


def prompts(engine: Engine, rows: int) -> list[Prompt]:
    """Real code of one length: pieces of the standard library."""
    import argparse
    import inspect

    ids = engine.tokenizer(inspect.getsource(argparse))["input_ids"]
    return [Prompt(ids[row * PROMPT : (row + 1) * PROMPT]) for row in range(rows)]


def against_transformers(engine: Engine, rows: int) -> Row:
    """Full depth, prefill and decode, against `generate` on the same weights and prompts."""
    model, batch = load_model(engine.facts), prompts(engine, rows)
    ids = torch.tensor([prompt.token_ids for prompt in batch])

    def theirs() -> None:
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)

    def ours() -> None:
        decode(engine, engine.prefill(batch, NEW), policy("full"))

    return ratio(f"speedup over transformers generate, batch {rows}", theirs, ours, pairs=5)


def decode(engine: Engine, prefilled: Prefilled, spec: PolicySpec) -> None:
    engine.decode(prefilled, spec, max_new_tokens=NEW, ends_with_line=False)


def forced_exit(engine: Engine, rows: int, exit_layer: int, kv: str) -> list[Row]:
    """Every token leaves at one exit point: what that is worth, and how much of its ideal is reached."""
    prefilled = engine.prefill(prompts(engine, rows), NEW)
    full, fixed = policy("full"), policy("fixed", exit_layer=exit_layer, kv=kv)
    name = f"exit at {exit_layer}, {kv}, batch {rows}"
    measured = ratio(
        f"{name}: speedup", lambda: decode(engine, prefilled, full), lambda: decode(engine, prefilled, fixed), pairs=5
    )
    slow, fast = (
        engine.decode(prefilled, spec, max_new_tokens=NEW, ends_with_line=False).ideal_ns for spec in (full, fixed)
    )
    ideal = slow / fast
    share = Row(f"{name}: of the ideal", *(v / ideal for v in (measured.value, measured.low, measured.high)), "x")
    return [measured, share]


def main() -> None:
    """Print the table and write it to build/bench/engine.json."""
    engine = Engine("smollm2-135m", "smollm2-135m")
    print(f"{engine.device_class}; prompts of {PROMPT} tokens, {NEW} new")
    rows = [against_transformers(engine, batch) for batch in (1, 8)]
    for batch in (1, 8):
        for kv in ("copy", "recompute"):
            rows += forced_exit(engine, batch, engine.exit_points[1], kv)
    write("engine", rows)


if __name__ == "__main__":
    main()
