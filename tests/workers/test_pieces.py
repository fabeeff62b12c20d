"""Batches that cannot be done together: the model breaks on one of their samples, or memory is too small for all."""

import gc
import multiprocessing
import re
import resource
import weakref
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    CONFIGS,
    CONTEXT,
    N_LAYERS,
    POINTS,
    facts_of,
    make_bundle,
    open_engine,
    random_model,
    save,
    write_bundle,
)
from transformers import LlamaConfig, LlamaForCausalLM

from db.records import OutcomeRow, SampleRow, ShardResults
from engine.engine import Engine
from engine.exits import TENSORS
from engine.memory import MIB, memory_errors
from engine.spec import parse_policy
from workers import evaluate
from workers.evaluate import Evaluation, Run

POLICIES: list[Any] = ["full", {"fixed": {"exit_layer": 2}}, {"confidence": {"threshold": 0.6}}]
BROKEN = 30  #: the position whose embedding is not a number


def sample(position: int, prompt: str) -> SampleRow:
    return SampleRow(position + 1, position, f"s{position}", prompt, "ref", "python", "f")


def letters(count: int) -> str:
    """A prompt of so many tokens."""
    return "".join(chr(ord("a") + i % 26) for i in range(count))


def evaluation(engine: Engine, policies: list[Any] = POLICIES) -> Evaluation:
    return Evaluation(
        engine=engine,
        runs=[Run(i, parse_policy(policy)) for i, policy in enumerate(policies)],
        content_hash="c",
        ends="text",
        max_new_tokens=6,
        metrics={"es": "es@1"},
        seed=0,
        timed=True,
    )


def outcomes(results: ShardResults) -> dict[tuple[int, int], OutcomeRow]:
    """By run and sample position."""
    found = {(row.run_id, row.sample_id - 1): row for row in results.outcomes}
    assert len(found) == len(results.outcomes), "a sample ended twice"
    return found


def completed(results: ShardResults) -> dict[tuple[int, int], list[int]]:
    """The tokens of every completion."""
    return {key: row.tokens.token_ids.tolist() for key, row in outcomes(results).items() if row.tokens is not None}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A model that works."""
    folder = save(random_model("llama"), tmp_path_factory.mktemp("whole") / "model")
    return open_engine(folder, make_bundle(folder / "exits", facts_of(folder)), threads=1)


# --- the model breaks ------------------------------------------------------------------------------------------------


def broken_engine(folder: Path, value: float) -> Engine:
    """A model in which the embedding of one position is `value`."""
    model: Any = random_model("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight[BROKEN] = value
    save(model, folder)
    return open_engine(folder, make_bundle(folder / "exits", facts_of(folder)), threads=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_sample_that_breaks_the_model_says_where_and_the_others_complete(value: float, tmp_path: Path) -> None:
    """Protects the shard from one sample: within its prompt, within its completion, and beside samples that are well.

    One position's embedding is broken: a prompt that reaches over it breaks in prefill, one that ends before it breaks
    when the completion comes there, and a short one never.
    """

    engine = broken_engine(tmp_path / "model", value)
    samples = [sample(0, letters(5)), sample(1, letters(40)), sample(2, letters(BROKEN - 2)), sample(3, letters(9))]
    results = evaluation(engine, ["full", {"fixed": {"exit_layer": 2}}]).together(0, samples)
    found = outcomes(results)
    assert {key for key, row in found.items() if row.error} == {(run, place) for run in (0, 1) for place in (1, 2)}
    for run in (0, 1):
        assert f"after layer {N_LAYERS}, at position 40 are not finite" in found[run, 1].error, "out of prefill"
    assert f"after layer {N_LAYERS}, at position {BROKEN + 1} are not finite" in found[0, 2].error
    assert f"after layer 2, at position {BROKEN + 1} are not finite" in found[1, 2].error
    assert all(row.isolated for row in found.values())
    well = evaluation(engine, ["full", {"fixed": {"exit_layer": 2}}]).together(0, [samples[0], samples[3]])
    assert [completed(results)[run, place] for run in (0, 1) for place in (0, 3)] == list(completed(well).values())
    assert [(row.rows, row.timed) for row in results.timings] == [(4, False)] * 2


def test_no_policy_passes_over_what_is_not_a_number(tmp_path: Path) -> None:
    """Protects results from rules that read a NaN as an answer, and the other samples under every rule."""
    policies: list[Any] = [
        {"fixed": {"exit_layer": 2, "kv": "mask"}},
        {"fixed": {"exit_layer": 2, "kv": "recompute"}},
        {"fixed": {"exit_layer": 2, "kv": "recompute", "verify": True}},
        {"confidence": {"threshold": 0.3}},
        {"margin": {"threshold": 0.3}},
        {"entropy": {"threshold": 0.5}},
        {"patience": {"patience": 1}},
        {"state-similarity": {"threshold": 0.9}},
        {"static": {"layers": [2, 3]}},
        {"sec": {"exit": 0.3, "stop": 0.3}},
        {"self-speculative": {"exit_layer": 2}},
    ]
    samples = [sample(0, letters(5)), sample(1, letters(BROKEN - 2)), sample(2, letters(40))]
    found = outcomes(evaluation(broken_engine(tmp_path / "model", float("nan")), policies).together(0, samples))
    for run, policy in enumerate(policies):
        assert found[run, 0].error is None, policy
        for place in (1, 2):
            assert re.search(r"after layer \d, at position \d+ are not finite", found[run, place].error or ""), policy


def test_a_broken_head_breaks_only_the_policies_that_ask_it(whole: Engine, tmp_path: Path) -> None:
    """Protects a job from one bad exit head: its run ends in errors that name the layer, full depth completes."""
    folder, facts = Path(whole.name), facts_of(Path(whole.name))
    tensors = load_file(make_bundle(tmp_path / "well", facts, head="untied", controller=False) / TENSORS)
    tensors["heads.2.weight"][7] = float("nan")
    exits = write_bundle(
        tmp_path / "broken", facts, tensors, head="untied", exit_points=POINTS, shortlist=None, controller=False
    )
    policies = ["full", {"fixed": {"exit_layer": 2}}, {"fixed": {"exit_layer": 4}}]
    found = outcomes(
        evaluation(open_engine(folder, exits, threads=1), policies).together(
            0, [sample(0, letters(5)), sample(1, letters(9))]
        )
    )
    assert {key for key, row in found.items() if row.error} == {(1, 0), (1, 1)}
    assert "after layer 2, at position 6 are not finite" in found[1, 0].error


# --- memory is too small ---------------------------------------------------------------------------------------------


class Scarce:
    """Prefill and decode that want far too much memory for more than so many rows, or for one prompt."""

    def __init__(
        self, engine: Engine, patch: pytest.MonkeyPatch, *, at: str, rows: int, too_long: int = CONTEXT
    ) -> None:
        self.rows, self.too_long, self.tried, self.engine = rows, too_long, [], engine
        act = getattr(engine, at)

        @memory_errors
        def scarce(batch: Any, *arguments: Any, **options: Any) -> object:
            prompts = batch if at == "prefill" else batch.prompts
            self.tried.append(len(prompts))
            states = torch.zeros(8)
            self.last = weakref.ref(states)
            if len(prompts) > self.rows or any(len(prompt.token_ids) > self.too_long for prompt in prompts):
                return torch.empty(2**58), states
            return act(batch, *arguments, **options)

        patch.setattr(engine, at, scarce)


SAMPLES = [sample(i, letters(5 + 3 * i)) for i in range(7)]


@pytest.mark.parametrize("at", ["prefill", "decode"])
def test_a_batch_that_memory_does_not_hold_is_halved_until_it_does(
    at: str, whole: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the job: nothing is lost, the samples are marked, and no timing of theirs enters a speedup."""
    expected = evaluation(whole).together(3, SAMPLES)
    scarce = Scarce(whole, monkeypatch, at=at, rows=2)
    results = evaluation(whole).together(3, SAMPLES)
    assert {row.isolated for row in results.outcomes} == {True}
    assert not [row.error for row in results.outcomes if row.error]
    assert outcomes(results).keys() == outcomes(expected).keys()
    assert {(row.run_id, row.sample_id) for row in results.scores} == {
        (run, i + 1) for run in range(3) for i in range(7)
    }
    assert [(row.run_id, row.batch, row.rows, row.timed) for row in results.timings] == [
        (run, 3, 7, False) for run in range(3)
    ]
    assert [row.decode_tokens for row in results.timings] == [
        sum(len(tokens) - 1 for (run, _), tokens in completed(results).items() if run == row.run_id)
        for row in results.timings
    ]
    if at == "prefill":
        assert scarce.tried == [7, 3, 1, 2, 4, 2, 2]
    assert {row.isolated for row in expected.outcomes} == {False}


def test_a_sample_that_memory_does_not_hold_alone_ends_with_an_error(
    whole: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the rest of the shard from one prompt that is too long for this machine."""
    Scarce(whole, monkeypatch, at="prefill", rows=4, too_long=20)
    found = outcomes(evaluation(whole).together(0, SAMPLES))
    assert {key for key, row in found.items() if row.error} == {(run, 6) for run in range(3)}
    assert found[0, 6].error.startswith("done alone, this sample ran out of memory")
    assert found[0, 6].error.endswith("or run fewer workers.")


def test_a_policy_that_needs_too_much_alone_ends_with_an_error(whole: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the other policies' completions of the same sample."""
    decode = whole.decode

    @memory_errors
    def scarce(prefilled: Any, policy: Any, **options: Any) -> object:
        return torch.empty(2**58) if policy.kind == "fixed" else decode(prefilled, policy, **options)

    monkeypatch.setattr(whole, "decode", scarce)
    found = outcomes(evaluation(whole).together(0, SAMPLES[:3]))
    assert {key for key, row in found.items() if row.error} == {(1, place) for place in range(3)}
    assert "done alone, this sample ran out of memory" in found[1, 0].error


def test_halving_begins_with_the_failed_batch_gone(whole: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the second try's memory from the first: its prefill must be free before a half is begun."""
    held: list[weakref.ref[Any]] = []
    prefill, decode = whole.prefill, whole.decode

    def remembering(prompts: Any, room: int, **options: Any) -> Any:
        assert [reference() for reference in held] == [None] * len(held)
        prefilled = prefill(prompts, room, **options)
        held.append(weakref.ref(prefilled))
        return prefilled

    @memory_errors
    def scarce(prefilled: Any, *arguments: Any, **options: Any) -> object:
        return torch.empty(2**58) if len(prefilled.prompts) > 2 else decode(prefilled, *arguments, **options)

    monkeypatch.setattr(whole, "prefill", remembering)
    monkeypatch.setattr(whole, "decode", scarce)
    monkeypatch.setattr(evaluate, "release", lambda device: None)  # not even the garbage collector's help is needed
    gc.disable()
    try:
        evaluation(whole).together(0, SAMPLES)
    finally:
        gc.enable()
    assert len(held) == 7


def _evaluate_in_little_memory(folder: Path, room: int, answer: Any) -> None:
    """In a process of its own: evaluate a batch of 8 when the process may have `room` bytes more than now."""
    subject = evaluation(open_engine(folder, threads=1), ["full"])
    subject.together(0, SAMPLES[:1])  # what is loaded late is loaded now
    limit = psutil.Process().memory_info().vms + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    results = subject.together(0, [sample(i, letters(CONTEXT)) for i in range(8)])
    answer.send([(row.sample_id, row.error, row.isolated, row.n_tokens) for row in results.outcomes])


def test_a_process_that_gets_no_more_memory_goes_on_with_smaller_batches(tmp_path: Path) -> None:
    """Protects against what torch really says when the system refuses it memory, and proves that halves need less.

    Keys and values of a row take 47 MiB here, and a policy works on a copy: eight rows need 750 MiB, two need 190.
    """
    config = CONFIGS["llama"].to_dict() | {"num_attention_heads": 24, "num_key_value_heads": 24, "head_dim": 428}
    folder = save(LlamaForCausalLM(LlamaConfig(**config)), tmp_path / "model")
    context = multiprocessing.get_context("spawn")
    answer, question = context.Pipe(duplex=False)
    process = context.Process(target=_evaluate_in_little_memory, args=(folder, 300 * MIB, question))
    process.start()
    question.close()
    found = answer.recv()
    process.join()
    assert process.exitcode == 0
    assert found == [(i + 1, None, True, found[i][3]) for i in range(8)]
