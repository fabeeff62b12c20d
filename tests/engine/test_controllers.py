"""Calibrated controllers: what they say, what a token that left early changes, and how replay can apply that."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import EOS, HIDDEN, POINTS, facts_of, open_engine, random_prompts, write_bundle

from engine.controllers import Controller, bias_name, promised, weight_name
from engine.engine import Engine
from engine.errors import BadInput
from engine.exits import AFTER_EXIT
from engine.policies import ControlledExit, View
from engine.spec import policy

AFTER = torch.tensor([0.5, -1.5, 0.25])


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    made = {name: torch.randn(shape) * 0.3 for name, shape in promised("calibrated", POINTS, HIDDEN).items()}
    return made | {AFTER_EXIT: AFTER}


@pytest.fixture(scope="module")
def engine(
    tiny_folder: Callable[[str], Path], tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Engine:
    folder = write_bundle(
        tmp_path_factory.mktemp("exits"), facts_of(tiny_folder("llama")), tensors,
        head="tied", exit_points=POINTS, shortlist=None, controller="calibrated",
    )  # fmt: skip
    return open_engine(tiny_folder("llama"), folder)


def test_each_exit_point_has_its_own_weights_and_bias(tensors: dict[str, torch.Tensor]) -> None:
    controller, states = Controller("calibrated", POINTS, tensors), torch.randn(5, HIDDEN) * 7
    for point in POINTS:
        own = states / states.pow(2).mean(dim=1, keepdim=True).sqrt()
        logits = own @ tensors[weight_name(point)].T + tensors[bias_name(point)]
        torch.testing.assert_close(controller(point, states), logits.softmax(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [True, False], ids=["loops", "torch"])
def test_what_an_exit_changes_can_be_applied_to_recorded_probabilities(
    tensors: dict[str, torch.Tensor], compiled: bool
) -> None:
    controller, states = Controller("calibrated", POINTS, tensors), torch.randn(6, HIDDEN)
    left = torch.tensor([True, False, True, False, True, True])
    with torch.inference_mode(compiled):
        recorded, behind, listed = (controller(4, states, one) for one in (None, left, left.tolist()))
    replayed = recorded * torch.where(left[:, None], AFTER.exp(), 1.0)
    replayed /= replayed.sum(dim=1, keepdim=True)
    torch.testing.assert_close(behind, replayed)
    assert torch.equal(listed, behind)
    assert not torch.allclose(recorded[0], replayed[0])


@pytest.mark.parametrize("options", [{}, {"kv": "recompute", "verify": True}])
def test_the_decoder_tells_the_controller_who_left(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    """Every view says of each row what stands in its record: whether its token before left early."""
    seen: list[tuple[int, int, bool]] = []
    decide = ControlledExit.decide

    def watched(self: ControlledExit, view: View):  # type: ignore[no-untyped-def]
        assert view.left is not None
        seen.extend(zip(view.rows, view.steps, view.left, strict=True))
        return decide(self, view)

    monkeypatch.setattr(ControlledExit, "decide", watched)
    start = engine.prefill(random_prompts(4, seed=3), 24)
    spec = policy("controller", exit=0.4, stop=1, **options)
    done = engine.decode(start, spec, max_new_tokens=24, ends_with_line=False).completions
    assert len({left for *_, left in seen}) == 2
    assert all(step > 0 and not left for _, step, left in seen if step == 1), "the first token came out of prefill"
    if not options:  # under verify a draft that was undone was asked about as well
        by_place = {(row, step): left for row, step, left in seen}
        for row, completion in enumerate(done):
            decisions = completion.decisions
            for step in range(1, len(decisions)):
                assert by_place[row, step] == (decisions[step - 1] == "exit"), (row, step)
    assert all(EOS not in completion.token_ids[:-1] for completion in done)


def test_the_papers_policy_is_not_about_another_controller(engine: Engine) -> None:
    with pytest.raises(BadInput, match="have a 'calibrated' one; use the policy 'controller'"):
        engine.check(policy("sec", exit=0.5, stop=0.5))
    engine.check(policy("controller", exit=0.5, stop=0.5))


def test_verified_tokens_of_a_controller_that_recalls_are_full_depths(engine: Engine) -> None:
    start = engine.prefill(random_prompts(4, seed=3), 24)
    spec = policy("controller", exit=0.4, stop=1, kv="recompute", verify=True)
    full, drafted = (
        engine.decode(start, one, max_new_tokens=24, ends_with_line=False).completions for one in (policy("full"), spec)
    )
    assert [one.token_ids for one in drafted] == [one.token_ids for one in full]
    assert any(draft for one in drafted for draft in one.draft_layers)
