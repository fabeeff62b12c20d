"""Tuning: low-rank deltas, learned step by step from the seed alone, whatever ends the process."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from engine.deltas import merge_deltas
from engine.errors import BadInput
from engine.exits import TENSORS
from engine.loading import load_model, resolve_model
from engine.training.backbone import Backbone, TunedProjection
from engine.training.checkpoint import Log, NotFinite
from engine.training.spec import TrainSpec
from engine.training.train import train
from engine.training.trainer import Losses
from engine.training.tuning import Truth, Tuner
from engine.training.workplace import Progress

TUNING: dict[str, Any] = {"rank": 4, "steps": 12, "windows": 2, "evaluate_every": 5, "warm_up": 2, "save_every": 0}
#: trains the spec on standard input into the folder named, and tells of every step
CHILD = """
import sys
from pathlib import Path
from engine.training.spec import TrainSpec
from engine.training.train import train
train(TrainSpec.model_validate_json(sys.stdin.read()), Path(sys.argv[1]),
      lambda now: print(now.stage, now.done // 64, flush=True))
"""


@pytest.fixture
def spec(world: TrainSpec) -> TrainSpec:
    """The same model and code, one epoch of heads, then tuning."""
    here = world.model_dump(exclude={"save_every"}) | {"epochs": 1, "threads": 1, "tuning": TUNING}
    return TrainSpec.model_validate(here)


def changed(spec: TrainSpec, **tuning: Any) -> TrainSpec:
    return TrainSpec.model_validate(spec.model_dump() | {"tuning": TUNING | tuning})


def curve(log: Path) -> list[dict[str, Any]]:
    """What a log says of each step, but for how fast it was."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "tokens_per_s"} for entry in entries]


def test_a_killed_tuning_goes_on_from_its_checkpoint_with_the_same_curve_to_the_same_bundle(
    spec: TrainSpec, tmp_path: Path
) -> None:
    train(spec, tmp_path / "unbroken")
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "broken")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(spec.model_dump_json())
        child.stdin.close()
        for line in child.stdout:
            if line == "tuning 7\n":
                child.kill()
        assert child.wait() == -9
    assert not (tmp_path / "broken").exists()
    train(spec, tmp_path / "broken")

    whole, resumed = (load_file(tmp_path / name / TENSORS) for name in ("unbroken", "broken"))
    assert whole.keys() == resumed.keys()
    assert any(name.startswith("deltas.") for name in whole)
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name
    unbroken, broken = (curve(tmp_path / f"{name}.log.jsonl") for name in ("unbroken", "broken"))
    assert [entry["step"] for entry in unbroken if entry["stage"] == "tuning" and "held_out" not in entry] == list(
        range(1, 13)
    )
    assert broken == unbroken


def test_a_log_forgets_the_steps_that_are_taken_again(tmp_path: Path) -> None:
    """A process that died behind its last checkpoint logged steps, and half a line, that the next one logs itself."""
    log = Log(tmp_path / "log.jsonl")
    for stage, steps in (("tuning", 4), ("heads", 2)):
        for step in range(1, steps + 1):
            log.write(stage, step, loss=1.0)
    with log.path.open("a") as file:
        file.write('{"stage": "tun')
    log.forget("tuning", 2)
    log.write("tuning", 3, loss=2.0)
    entries = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [(entry["stage"], entry["step"]) for entry in entries] == [
        ("tuning", 1), ("tuning", 2), ("heads", 1), ("heads", 2), ("tuning", 3),
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "codegen", "gpt_bigcode", "starcoder2"])
def test_a_backbone_starts_as_its_model_and_ends_as_its_model_with_the_deltas(
    family: str, tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHORTSTOP_CACHE", str(tmp_path / "cache"))
    facts = resolve_model(str(tiny_folder(family)))
    ids = torch.arange(1, 25).view(2, 12)
    plain = load_model(facts)
    backbone = Backbone(load_model(facts), 3, torch.Generator().manual_seed(0), None)
    with torch.no_grad():
        [states] = backbone.states(ids, (facts.n_layers,))
        before = plain.get_output_embeddings()(backbone.norm(states))
        torch.testing.assert_close(before, plain(ids).logits)
        for parameter in backbone.deltas.values():
            parameter.normal_(generator=torch.Generator().manual_seed(1), std=0.1)
        [states] = backbone.states(ids, (facts.n_layers,))
        tuned = plain.get_output_embeddings()(backbone.norm(states))
        assert not torch.allclose(tuned, before, atol=1e-2)
        merge_deltas(plain, {name: parameter.detach() for name, parameter in backbone.deltas.items()})
        torch.testing.assert_close(plain(ids).logits, tuned, atol=1e-4, rtol=1e-4)


def test_the_gradients_of_deltas_are_those_of_the_whole_product() -> None:
    generator = torch.Generator().manual_seed(0)
    projection = torch.nn.Linear(5, 7).double()
    tuned = TunedProjection(projection, 2, generator).double()
    tuned.weight, tuned.bias = projection.weight.data, projection.bias.data
    tuned.b.data.normal_(generator=generator)
    x = torch.randn(2, 3, 5, dtype=torch.double, generator=generator, requires_grad=True)
    a, b = tuned.a.detach().clone().requires_grad_(), tuned.b.detach().clone().requires_grad_()
    plain = F.linear(x, projection.weight.detach() + b @ a, projection.bias.detach())
    weights = torch.randn(plain.shape, dtype=torch.double, generator=generator)
    [to_x, to_a, to_b] = torch.autograd.grad((plain * weights).sum(), [x, a, b])
    made = tuned(x)
    (made * weights).sum().backward()
    torch.testing.assert_close(made, plain)
    for ours, autograds in ((x.grad, to_x), (tuned.a.grad, to_a), (tuned.b.grad, to_b)):
        torch.testing.assert_close(ours, autograds)


def test_a_steps_gradient_is_that_of_the_loss_it_tells(
    spec: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer's is written by hand, the exits' graphs are cut: together they must be the joint loss's."""
    tuner = made_tuner(spec, tmp_path)
    parameter = tuner.backbone.deltas["deltas.model.layers.1.mlp.up_proj.b"]
    ids, points = tuner._windows(0), tuner.points
    weights = dict.fromkeys(points, 5.0)  # as large as the last layer's part: neither hides the other

    # The exits' target is what the last layer says: it is a constant to them, and has to stay one here.
    truth, told = tuner._truth, []

    def constant(normed: torch.Tensor, following: torch.Tensor) -> Truth:
        told.append(truth(normed, following))
        return replace(told[-1], target=told[0].target)

    monkeypatch.setattr(tuner, "_truth", constant)
    tuner._losses(ids, points, set(), weights)
    assert parameter.grad is not None
    place = divmod(int(parameter.grad.abs().argmax()), parameter.shape[1])
    slope = parameter.grad[place].item()
    ends = []
    for step in (0.02, -0.02):
        with torch.no_grad():
            parameter[place] += step
            ends.append(tuner._losses(ids, points, set(), weights).joint(5.0))
            parameter[place] -= step
    assert slope == pytest.approx((ends[0] - ends[1]) / 0.04, rel=0.05)


def test_tuning_lets_exits_agree_more_and_full_depth_lose_nothing(spec: TrainSpec, tmp_path: Path) -> None:
    spec = changed(spec, steps=60, learning_rate=5e-3, evaluate_every=60).model_copy(
        update={"holdout": spec.corpus[1:], "corpus": spec.corpus[:1]}
    )
    train(spec, tmp_path / "bundle")
    looks = [entry for entry in curve(tmp_path / "bundle.log.jsonl") if entry.get("held_out") and "loss" in entry]
    first, last = looks[0], looks[-1]
    assert last["step"] == 60
    assert last["loss"] < first["loss"]
    assert last["exits"]["2"] < first["exits"]["2"]


def test_rotation_and_layer_dropout_are_drawn_from_the_seed(spec: TrainSpec, tmp_path: Path) -> None:
    tuner = made_tuner(changed(spec, exits="rotational", weighted="by-depth", layer_dropout=0.9), tmp_path)
    seen, dropped = [], []
    for step in range(40):
        tuner.step = step
        seen.append(tuner._points_of_step())
        dropped.append(tuner._dropped())
        assert tuner._dropped() == dropped[-1]
    assert seen[:4] == [(2,), (4,), (2,), (4,)]
    # One at a time with twice the weight: a turn weighs as much as all together.
    assert tuner._weights((2,)) == pytest.approx({2: 0.5 * 2 * 2 / 3})
    counts = [sum(layer in layers for layers in dropped) for layer in range(1, 7)]
    assert counts[0] == counts[-1] == 0  # never the first (its probability is 0), never the last
    assert counts[4] > counts[1]
    with torch.no_grad():
        whole = tuner.backbone.states(tuner._windows(0), (6,))[0]
        less = tuner.backbone.states(tuner._windows(0), (6,), {3})[0]
    assert not torch.equal(whole, less)


def test_a_loss_that_is_no_number_keeps_the_checkpoint_before_it(
    spec: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = Tuner._losses

    def broken(self: Tuner, *arguments: Any) -> Losses:
        found = losses(self, *arguments)
        return Losses(full=float("nan")) if self.step == 7 else found

    monkeypatch.setattr(Tuner, "_losses", broken)
    with pytest.raises(NotFinite, match="at step 7"):
        train(spec, tmp_path / "bundle")
    assert torch.load(tmp_path / "bundle.work" / "tuning.pt", weights_only=True)["step"] == 7


def test_tuning_goes_on_from_a_bundle(spec: TrainSpec, tmp_path: Path) -> None:
    """A second training starts at the first one's deltas and lenses, also with a higher rank: nothing is lost."""
    train(spec, tmp_path / "first")
    more = changed(spec, steps=2, rank=6).model_copy(update={"start": str(tmp_path / "first")})
    train(more, tmp_path / "second")
    first, second = (
        [entry for entry in curve(tmp_path / f"{name}.log.jsonl") if entry["stage"] == "tuning" and "held_out" in entry]
        for name in ("first", "second")
    )
    best = min(entry["loss"] + 0.5 * sum(entry["exits"].values()) for entry in first)
    begun = second[0]["loss"] + 0.5 * sum(second[0]["exits"].values())
    assert begun <= best + 0.02  # halves of 16 bits were stored


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"head": "untied"}, "only lenses are tuned"),
        ({"shortlist": None}, "shortlist is missing"),
    ],
)
def test_a_tuning_that_cannot_be_is_refused(spec: TrainSpec, fields: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TrainSpec.model_validate(spec.model_dump() | fields)


def test_a_start_of_another_rank_is_refused(spec: TrainSpec, tmp_path: Path) -> None:
    train(changed(spec, steps=1), tmp_path / "first")
    other = spec.model_copy(update={"start": str(tmp_path / "first"), "rank": 8})
    with pytest.raises(BadInput, match="make them the same"):
        train(other, tmp_path / "second")
    lower = changed(spec, rank=2).model_copy(update={"start": str(tmp_path / "first")})
    with pytest.raises(BadInput, match=r"tuning.rank is 2, but the deltas of .* have rank 4; give that at least"):
        train(lower, tmp_path / "third")
    assert not (tmp_path / "third.work").exists()


def made_tuner(spec: TrainSpec, tmp_path: Path) -> Tuner:
    """A tuner as `train` makes it, stopped before its first step."""
    kept: list[Tuner] = []

    class Made(Exception):
        pass

    def stop(self: Tuner, on_progress: object) -> None:
        kept.append(self)
        raise Made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tuner, "train", stop)
        with pytest.raises(Made):
            train(spec, tmp_path / "made")
    return kept[0]


def test_progress_tells_losses_by_exit(spec: TrainSpec, tmp_path: Path) -> None:
    told: list[Progress] = []
    train(changed(spec, steps=2), tmp_path / "bundle", told.append)
    steps = [now for now in told if now.stage == "tuning"]
    assert [now.done for now in steps] == [64, 128]
    assert all(set(now.exits) == {2, 4} and now.loss is not None for now in steps)
