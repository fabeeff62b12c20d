"""How a completion ends: end-of-sequence, length, line, stop; and what its record looks like then."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny_models import EOS, N_LAYERS, random_prompts

from engine.decode import Decoding, Ends
from engine.engine import Engine, Prompt
from engine.policies import CONTINUE, STOP, Rule, Verdict, View
from engine.record import Completion, Finish
from engine.spec import parse_policy, policy

PROMPTS = random_prompts(6, seed=21, longest=20)
FULL = policy("full")


def ids_of(engine: Engine, text: str) -> list[int]:
    return engine.tokenizer(text)["input_ids"]


def scripted(engine: Engine, prompt: Prompt, script: list[int], *, line: bool = False, new: int = 20) -> Completion:
    """What the engine makes of a model that writes this script: its own, with the unembedding's answers laid down."""
    stack, written = engine.stack, iter(script)

    def unembed(states: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(states), stack.vocab_size)
        logits[:, next(written)] = 50.0
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "unembed", unembed)
        start = engine.prefill([prompt], new)
        return engine.decode(start, FULL, max_new_tokens=new, ends_with_line=line).completions[0]


def test_length(tiny_engine: Callable[..., Engine]) -> None:
    """Protects `max_new_tokens`."""
    engine = tiny_engine("llama")
    for row in engine.decode(engine.prefill(PROMPTS, 7), FULL, max_new_tokens=7, ends_with_line=False).completions:
        assert (row.finish, len(row.token_ids), row.n_tokens, row.stopped) == (Finish.LENGTH, 7, 7, False)


def test_one_new_token_comes_out_of_prefill(tiny_engine: Callable[..., Engine]) -> None:
    """Protects the shortest completion: at full depth, with nothing decoded and nothing to be timed."""
    engine = tiny_engine("llama", head="tied")
    start = engine.prefill(PROMPTS, 1)
    decoded = engine.decode(start, policy("fixed", exit_layer=1), max_new_tokens=1, ends_with_line=False)
    assert [row.exit_layers for row in decoded.completions] == [[N_LAYERS]] * len(PROMPTS)
    assert {tuple(row.decisions) for row in decoded.completions} == {("full",)}
    assert (decoded.decode_tokens, decoded.flops, decoded.ideal_ns) == (0, 0, 0)


@pytest.mark.parametrize("kv", ["copy", "recompute"])
@pytest.mark.parametrize(
    "spec",
    [{"fixed": {"exit_layer": 1}}, {"confidence": {"threshold": 0}}, {"controller": {"exit": 0, "stop": 0}}],
    ids=lambda spec: next(iter(spec)),
)
def test_first_token_runs_at_full_depth(
    spec: dict[str, dict[str, object]], kv: str, tiny_engine: Callable[..., Engine]
) -> None:
    """Protects SEC's first token, for every policy: even one that always leaves has a prompt to go through."""
    engine = tiny_engine("llama", head="tied")
    [(kind, options)] = spec.items()
    eager = parse_policy({kind: options | {"kv": kv}})
    decoded = engine.decode(engine.prefill(PROMPTS, 5), eager, max_new_tokens=5, ends_with_line=False)
    full = engine.decode(engine.prefill(PROMPTS, 5), FULL, max_new_tokens=5, ends_with_line=False)
    for row, reference in zip(decoded.completions, full.completions, strict=True):
        assert (row.exit_layers[0], row.layers_run[0], row.decisions[0]) == (N_LAYERS, N_LAYERS, "full")
        assert row.token_ids[0] == reference.token_ids[0]
        assert any(layer < N_LAYERS for layer in row.exit_layers[1:]) or len(row.exit_layers) == 1


def test_end_of_sequence(tiny_engine: Callable[..., Engine]) -> None:
    """Protects the model's own end: its token is in the record, not in the text, and nothing follows."""
    engine = tiny_engine("llama")
    row = scripted(engine, PROMPTS[3], [*ids_of(engine, "ab"), EOS, *ids_of(engine, "cd")])
    assert (row.finish, row.text, row.token_ids) == (Finish.EOS, "ab", [*ids_of(engine, "ab"), EOS])
    assert row.n_tokens == 3


def test_end_of_sequence_at_once(tiny_engine: Callable[..., Engine]) -> None:
    """Protects an empty completion."""
    row = scripted(tiny_engine("llama"), PROMPTS[3], [EOS, EOS])
    assert (row.finish, row.text, row.token_ids) == (Finish.EOS, "", [EOS])


@pytest.mark.parametrize(
    ("written", "text"), [("x = 1\ny", "x = 1"), ("f(x);\n  y", "f(x);"), ("\nx", ""), ("if (a)\n", "if (a)")]
)
def test_line(written: str, text: str, tiny_engine: Callable[..., Engine]) -> None:
    """Protects the end of a line task: the text is cut at the newline, also where a token goes on behind it."""
    engine = tiny_engine("llama")
    script = ids_of(engine, written)
    row = scripted(engine, PROMPTS[3], script, line=True)
    assert (row.finish, row.text) == (Finish.LINE, text)
    assert row.token_ids == script[: row.n_tokens]
    assert [("\n" in engine.tokenizer.decode([token])) for token in row.token_ids] == [False] * (row.n_tokens - 1) + [
        True
    ]
    assert scripted(engine, PROMPTS[3], script, line=False, new=len(script)).text == written, (
        "only line tasks end there"
    )


def test_healed_prompt(tiny_engine: Callable[..., Engine]) -> None:
    """Protects token healing: the first token begins with what was taken back, which is not offered twice."""
    engine = tiny_engine("llama")
    newline = ids_of(engine, "\n")[0]
    [healed] = engine.encode(["if x:\n"], 20, heal=True)
    assert (healed.token_ids, healed.healed) == (ids_of(engine, "if x:"), newline)
    [plain] = engine.encode(["if x:\n"], 20)
    assert (plain.token_ids, plain.healed) == (ids_of(engine, "if x:\n"), None)
    row = scripted(engine, healed, [newline, *ids_of(engine, " y()\nz")], line=True)
    assert (row.finish, row.text) == (Finish.LINE, " y()"), "the newline that was healed ends nothing"
    free = engine.decode(engine.prefill([healed], 4), FULL, max_new_tokens=4, ends_with_line=True).completions[0]
    assert engine.text.tokens[free.token_ids[0]].startswith("\n")


class _StopsAt(Rule):
    """Gives up on one row, at one exit point, after so many tokens; everybody else goes on."""

    stops = True

    def __init__(self, point: int, row: int, after: int) -> None:
        self.points, self.row, self.after = (point,), row, after

    def decide(self, view: View) -> Verdict:
        self.after -= 1
        gives_up = [STOP if row == self.row and self.after < 0 else CONTINUE for row in view.rows]
        return Verdict(torch.tensor(gives_up), torch.full((len(view.rows),), 0.75))


@pytest.mark.parametrize("point", [2, N_LAYERS])
def test_stop(point: int, tiny_engine: Callable[..., Engine]) -> None:
    """Protects the stop: a last record without a token, not counted; the neighbours finish as if alone."""
    engine = tiny_engine("llama", head="tied")
    start = engine.prefill(PROMPTS, 8)
    with torch.inference_mode():
        rule = _StopsAt(point, row=2, after=3)
        decoding = Decoding(engine.stack, engine.heads, rule, FULL, start.start.copy(), Ends(8, {}))
        decoding.run()
    records, finishes = decoding.records, decoding.finishes
    full = engine.decode(start, FULL, max_new_tokens=8, ends_with_line=False).completions
    stopped = Completion("", records[2], finishes[2], len(PROMPTS[2].token_ids), 0)
    assert stopped.stopped
    assert (stopped.n_tokens, len(stopped.token_ids)) == (4, 4)
    assert stopped.token_ids == full[2].token_ids[:4]
    assert records[2].token_ids[-1] == -1
    assert (stopped.decisions[-1], stopped.exit_layers[-1], stopped.layers_run[-1]) == ("stop", point, point)
    assert stopped.confidences[-1] == 0.75
    for row in (0, 1, 3, 4, 5):
        assert np.array_equal(records[row].token_ids, full[row].records.token_ids)


def test_stops_are_not_counted_as_written(tiny_engine: Callable[..., Engine]) -> None:
    """Protects `decode_tokens`: neither a row's first token nor its stop was written by the timed steps."""
    engine = tiny_engine("llama", head="tied")
    decoded = engine.decode(
        engine.prefill(PROMPTS, 8), policy("sec", exit=1, stop=0.6), max_new_tokens=8, ends_with_line=False
    )
    stops = sum(row.stopped for row in decoded.completions)
    assert stops > 0
    assert decoded.decode_tokens == sum(len(row.records) for row in decoded.completions) - len(PROMPTS) - stops


def test_batches_of_complete(tiny_engine: Callable[..., Engine]) -> None:
    """Protects the order of `complete`, and an empty list."""
    engine = tiny_engine("llama")
    texts = ["a = 1", "while True:", "x", "def f(x):", "return"]
    one_by_one = [engine.complete([text], max_new_tokens=4)[0].token_ids for text in texts]
    assert [row.token_ids for row in engine.complete(texts, max_new_tokens=4, batch_size=2)] == one_by_one
    assert engine.complete([], max_new_tokens=4) == []
