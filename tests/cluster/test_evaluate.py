"""What a batch's evaluation promises, without a record."""

from dataclasses import replace
from pathlib import Path

import pytest
from small_world import World

from db.records import SampleRow
from engine.engine import Engine
from engine.errors import BadInput
from engine.spec import parse_policy
from workers.benchmarks.ends import cut
from workers.bundle import pack, unpack
from workers.evaluate import Evaluation, Run
from workers.scoring.text import es

SAMPLES = [SampleRow(i + 1, i, f"s{i}", f"x = {i}\nret", "urn x", "python", "f") for i in range(4)]


@pytest.fixture(scope="module")
def evaluation(world: World) -> Evaluation:
    engine = Engine(str(world.model), world.exits, device="cpu", threads=1)
    policies = ["full", {"confidence": {"threshold": 0.6}}, {"patience": {"patience": 1}}]
    return Evaluation(
        engine=engine,
        runs=[Run(i, parse_policy(policy)) for i, policy in enumerate(policies)],
        content_hash="c",
        ends="text",
        max_new_tokens=6,
        metrics={"es": "es@1", "token_agreement": "token_agreement@1", "exact_agreement": "exact_agreement@1"},
        seed=0,
        timed=True,
    )


def test_policies_take_turns_in_an_order_that_belongs_to_the_batch(evaluation: Evaluation) -> None:
    """No policy is always first, and whoever repeats a batch repeats its order."""
    orders = [[run.id for run in evaluation.order(batch)] for batch in range(60)]
    assert orders == [[run.id for run in evaluation.order(batch)] for batch in range(60)]
    assert len({tuple(order) for order in orders}) == 6


def test_all_policies_share_one_prefill(evaluation: Evaluation) -> None:
    timings = evaluation.together(0, SAMPLES).timings
    assert len(timings) == 3
    assert len({timing.prefill_ns for timing in timings}) == 1


def test_agreement_is_with_full_depth_of_the_same_sample(evaluation: Evaluation) -> None:
    results = evaluation.together(0, SAMPLES)
    written = {(row.run_id, row.sample_id): row.tokens.token_ids.tolist() for row in results.outcomes}
    agreed = {(row.run_id, row.sample_id): row.value for row in results.scores if row.metric == "exact_agreement"}
    assert len(agreed) == 12
    for (run_id, sample_id), value in agreed.items():
        assert value == (written[run_id, sample_id] == written[0, sample_id])
    assert set(agreed.values()) == {0.0, 1.0}


def test_texts_end_where_the_benchmark_says_and_tokens_do_not(evaluation: Evaluation) -> None:
    """Under every policy, before anything is scored: what is kept is what was scored."""
    samples = [replace(sample, prompt=f"x = {sample.position}; y", language="java") for sample in SAMPLES]
    whole = evaluation.together(0, samples)
    ended = replace(evaluation, ends="statement").together(0, samples)
    texts = [row.text for row in whole.outcomes]
    cuts = [cut(samples[row.sample_id - 1].prompt, str(row.text), "statement", "java") for row in whole.outcomes]
    assert [row.text for row in ended.outcomes] == cuts
    assert cuts != texts
    assert [row.tokens.token_ids.tolist() for row in ended.outcomes] == [
        row.tokens.token_ids.tolist() for row in whole.outcomes
    ]
    scores = [row.value for row in ended.scores if row.metric == "es"]
    assert scores == [es(text, "urn x") for text in cuts]


def test_full_depth_that_is_done_already_is_timed_beside_the_others_and_leaves_nothing(evaluation: Evaluation) -> None:
    """What is scored and written is as if it had not been done; its time goes to the rows of the others."""
    full, *others = evaluation.runs
    added = replace(evaluation, runs=[replace(full, is_done=True), *others])
    for whole, part in [
        (evaluation.together(0, SAMPLES), added.together(0, SAMPLES)),
        (evaluation.alone(0, SAMPLES), added.alone(0, SAMPLES)),
    ]:
        assert part.scores == [row for row in whole.scores if row.run_id != full.id]
        assert [(row.run_id, row.sample_id, row.text) for row in part.outcomes] == [
            (row.run_id, row.sample_id, row.text) for row in whole.outcomes if row.run_id != full.id
        ]
        assert [row.run_id for row in part.timings] == [run.id for run in others]
        beside = {row.full_decode_ns for row in part.timings}
        assert len(beside) == 1
        assert (None in beside) == (not part.timings[0].timed)
        assert {row.full_decode_ns for row in whole.timings} == {None}


def test_alone_a_sample_is_announced_before_it_is_tried_and_the_guilty_never_is(evaluation: Evaluation) -> None:
    announced: list[int] = []
    results = evaluation.alone(0, SAMPLES, guilty=[2], announce=lambda sample: announced.append(sample.position))
    assert announced == [0, 1, 3]
    assert {row.sample_id for row in results.outcomes if row.error} == {3}
    assert len(results.outcomes) == 12
    assert all(row.isolated for row in results.outcomes)
    assert [timing.timed for timing in results.timings] == [False] * 3


def test_a_bundle_is_the_same_bytes_wherever_it_is_packed(world: World, tmp_path: Path) -> None:
    from engine.exits import exits_hash

    content, hash = pack(world.exits), exits_hash(world.exits)
    first = unpack(content, hash, tmp_path / "a")
    assert pack(first) == content
    (first / "exits.safetensors").write_bytes(b"damaged")
    assert exits_hash(unpack(content, hash, tmp_path / "a")) == hash
    with pytest.raises(BadInput, match="damaged"):
        unpack(content, "0" * 64, tmp_path / "a")
