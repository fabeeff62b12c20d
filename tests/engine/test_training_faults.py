"""Training when something breaks: numbers that are none, a disk that is full; what there was is kept, and told."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_world import PowerCut, changed, cut_at

from engine.errors import BadInput
from engine.exits import TENSORS
from engine.training.checkpoint import Checkpoint, Log, NotFinite
from engine.training.controller import ControllerTrainer
from engine.training.heads import HeadTrainer
from engine.training.spec import TrainSpec
from engine.training.train import train
from engine.training.trainer import Losses
from engine.training.workplace import Progress


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(
    world: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = HeadTrainer.losses_of_step

    def broken(self: HeadTrainer) -> Losses:
        return Losses(exits={2: float("nan")}) if self.step == 55 else steps(self)

    monkeypatch.setattr(HeadTrainer, "losses_of_step", broken)
    with pytest.raises(NotFinite, match="at step 55"):
        train(world, tmp_path / "bundle")
    assert torch.load(tmp_path / "bundle.work" / "heads.pt", weights_only=True)["step"] == 55


def test_a_gradient_that_is_no_number_is_told_before_it_is_in_a_checkpoint(
    world: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of its step is still one: only the next would tell, when the checkpoint has broken parameters."""
    steps = HeadTrainer.losses_of_step

    def broken(self: HeadTrainer) -> Losses:
        found = steps(self)
        if self.step == 55:
            self.parameters["heads.2.up"].grad.fill_(float("inf"))
        return found

    monkeypatch.setattr(HeadTrainer, "losses_of_step", broken)
    with pytest.raises(NotFinite, match=r"heads: the gradient is (inf|nan) at step 55"):
        train(world, tmp_path / "bundle")
    kept = torch.load(tmp_path / "bundle.work" / "heads.pt", weights_only=True)
    assert kept["step"] == 55
    assert all(torch.isfinite(parameter).all() for parameter in kept["parameters"].values())


def test_a_controllers_loss_that_is_no_number_keeps_its_last_checkpoint(
    world: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = ControllerTrainer._logits

    def broken(self: ControllerTrainer, places: np.ndarray) -> torch.Tensor:
        return logits(self, places) * (float("nan") if self.step == 52 else 1.0)

    monkeypatch.setattr(ControllerTrainer, "_logits", broken)
    with pytest.raises(NotFinite, match="controller: the loss is nan at step 52"):
        train(changed(world, controller={"kind": "sec", "epochs": 60}), tmp_path / "bundle")
    assert torch.load(tmp_path / "bundle.work" / "controller.pt", weights_only=True)["step"] == 50


def test_an_interrupted_training_logs_nothing_twice_though_it_had_no_checkpoint(
    world: TrainSpec, tmp_path: Path
) -> None:
    """The look before the first step is taken again, and its line with it."""
    spec = changed(world, save_every=1000)
    with pytest.raises(PowerCut):
        train(spec, tmp_path / "bundle", cut_at("heads", 1))
    train(spec, tmp_path / "bundle")
    entries = [json.loads(line) for line in (tmp_path / "bundle.log.jsonl").read_text().splitlines()]
    heads = [(entry["step"], entry.get("held_out", False)) for entry in entries if entry["stage"] == "heads"]
    assert heads[0] == (0, True)
    assert len(heads) == len(set(heads))


@pytest.mark.parametrize("stage", ["heads", "controller", "predictions"])
def test_a_disk_that_fills_up_later_is_told_and_training_goes_on(world: TrainSpec, tmp_path: Path, stage: str) -> None:
    """What is written then are checkpoints and what heads predict; nothing of what is there is lost."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(progress: Progress) -> None:
        at = {"heads": "held-out states", "predictions": "heads", "controller": "predictions"}[stage]
        if progress.stage == at and progress.done == progress.total:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "write", lambda *_, **__: None)  # it would be the first that has no room
        try:
            with pytest.raises(BadInput, match=r"^out: .* (cannot be written|has no room for)"):
                train(world, tmp_path / "bundle", fill)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    train(world, tmp_path / "whole")
    train(world, tmp_path / "bundle")
    one, other = (load_file(tmp_path / name / TENSORS) for name in ("whole", "bundle"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_without_room_leaves_the_one_before(tmp_path: Path) -> None:
    """Whole, and with no half of the new one beside it that would take the room."""
    parameters = {"weight": torch.nn.Parameter(torch.ones(4_000))}
    optimiser = torch.optim.Adam(parameters.values())
    checkpoint = Checkpoint(tmp_path / "heads.pt")
    checkpoint.save(7, parameters, optimiser)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, before[1]))
        with pytest.raises(BadInput, match=r"^out: .*heads.pt cannot be written .* make room"):
            checkpoint.save(8, {"weight": torch.zeros(4_000)}, optimiser)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["heads.pt"]
    assert checkpoint.load(parameters, optimiser, torch.device("cpu")) == {"step": 7}
    assert parameters["weight"].eq(1).all()


def test_a_log_without_room_is_told(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl")
    log.write("heads", 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, before[1]))
        with pytest.raises(BadInput, match=r"the log .* cannot be written .* make room"):
            log.write("heads", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_without_room_for_states_is_told_before_anything_is_computed(world: TrainSpec, tmp_path: Path) -> None:
    """Writing to a mapped file that has no disk behind it would end the process without a word."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    told: list[Progress] = []
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(BadInput, match=r"has no room for .* GB of states"):
            train(world, tmp_path / "bundle", told.append)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert told == []
    assert not (tmp_path / "bundle").exists()
    train(world, tmp_path / "bundle")
