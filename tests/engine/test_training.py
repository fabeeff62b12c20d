"""Training: seeded, resumable, honest about what it learned from, and refused in one sentence where it cannot be."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import HIDDEN, own_cache
from training_world import PowerCut, changed, cut_at

from engine.controllers import promised
from engine.engine import Engine
from engine.errors import BadInput
from engine.exits import MANIFEST, TENSORS, read_manifest
from engine.preview import Preview
from engine.training.heads import HeadTrainer
from engine.training.labels import labels, left_before
from engine.training.preview import find_preview, normed
from engine.training.scores import auroc, lift, reliability_bins
from engine.training.spec import Target, TrainSpec
from engine.training.states import States
from engine.training.targets import targets
from engine.training.train import train


@pytest.mark.parametrize(
    ("stage", "done", "controller"),
    [("states", 200, "sec"), ("heads", 60, "sec"), ("controller", 1, "sec"), ("controller", 55, "calibrated")],
)
def test_an_interrupted_training_ends_as_an_unbroken_one(
    world: TrainSpec, tmp_path: Path, stage: str, done: int, controller: str
) -> None:
    world = changed(world, controller={"kind": controller, "epochs": 60})
    train(world, tmp_path / "unbroken")
    with pytest.raises(PowerCut):
        train(world, tmp_path / "broken", cut_at(stage, done))
    assert (tmp_path / "broken.work").is_dir()
    train(world, tmp_path / "broken")

    whole, resumed = (load_file(tmp_path / name / TENSORS) for name in ("unbroken", "broken"))
    controllers = promised(controller, world.exit_points, HIDDEN)  # type: ignore[arg-type]
    assert whole.keys() == resumed.keys() == {
        "shortlist", "preview.down", "preview.up", *controllers,
        "heads.2.down", "heads.2.up", "heads.4.down", "heads.4.up",
    }  # fmt: skip
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name
    assert not (tmp_path / "broken.work").exists()


@pytest.mark.parametrize("head", ["tied", "lens", "untied"])
def test_a_trained_bundle_serves_its_model_and_says_how_it_was_made(
    world: TrainSpec, tmp_path: Path, head: str
) -> None:
    spec = changed(world, head=head)
    train(spec, tmp_path / "bundle")
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.training == spec.model_dump(mode="json")
    assert [(entry["source"], entry.get("held_out", False)) for entry in manifest.corpus] == [
        ("one", False), ("two", False), ("kept", True),
    ]  # fmt: skip
    assert all(entry["tokens"] > 0 for entry in manifest.corpus)
    assert set(manifest.scores) == {"2", "4", "full"}
    with own_cache(tmp_path / "cache"):
        engine = Engine(spec.model, tmp_path / "bundle", device="cpu")
    for policy in ({"confidence": {"threshold": 0.0}}, {"sec": {"exit": 0.0, "stop": 1.0}}):
        [completion] = engine.complete(["def alpha_1_"], policy, max_new_tokens=8)
        assert set(completion.exit_layers) <= {2, 4, engine.n_layers}


def test_the_preview_is_the_best_of_its_rank(world: TrainSpec, tmp_path: Path) -> None:
    """Protects the projection: no other of its rank leaves logits nearer, and at full rank they are exact."""
    spec = changed(world, controller=False, preview=6)
    manifest = train(spec, tmp_path / "bundle")
    assert manifest.preview == 6
    with own_cache(tmp_path / "cache"):
        engine = Engine(spec.model, tmp_path / "bundle", device="cpu")
    stack = engine.stack
    with torch.inference_mode():
        hidden = torch.randn(400, stack.hidden_size, generator=torch.Generator().manual_seed(1))
        raw, nothing = hidden.half().numpy()[:, None], np.zeros(400, np.int32)
        states = States(raw, nothing, nothing, top=raw, top_shares=raw)  # type: ignore[arg-type]
        x = normed(stack, states, range(400))
        exact = x @ stack.unembedding.t()

        def projected(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
            return x @ tensors["preview.down"].t() @ tensors["preview.up"].t() @ stack.unembedding.t()

        def missed(tensors: dict[str, torch.Tensor]) -> float:
            return float((exact - projected(tensors)).square().mean())

        # Eckart and Young: the squares that are left are those of the singular values left out
        singular = torch.linalg.svdvals(exact)
        found = missed(find_preview(stack, states, 6))
        assert found == pytest.approx(float(singular[6:].square().sum()) / exact.numel(), rel=1e-3)
        assert missed(find_preview(stack, states, 10_000)) < 1e-6 < found
        looked = Preview(stack.unembedding, None, find_preview(stack, states, 6)).looked(x)
        rounded = (looked - projected(find_preview(stack, states, 6))).square().mean()
        assert 0 < rounded < found / 100, "eight bits lose little beside what the rank leaves out"
    scores = manifest.scores["full"]
    assert scores["preview_finds_in_256"] == 1.0, "a vocabulary of fewer tokens is computed whole"


def test_lenses_learn(world: TrainSpec, tmp_path: Path) -> None:
    """More training, more agreement with full depth on what was learned: a wrong loss would not show it."""
    world = changed(world, shortlist=None, holdout=world.corpus[1:], corpus=world.corpus[:1])
    little, much = (changed(world, epochs=n) for n in (1, 60))
    scores = [train(spec, tmp_path / str(spec.epochs)).scores["2"]["agrees"] for spec in (little, much)]
    assert scores[1] > scores[0]


def test_labels_are_those_of_sec() -> None:
    """No layer right: stop. From the first right layer on: exit, even where a later layer errs. Before it: continue."""
    reference = [7, 7, 7, 7]
    said = torch.tensor([[7, 1, 7], [1, 7, 1], [1, 1, 1], [1, 1, 1]])
    full = [7, 1, 7, 1]
    nothing = torch.zeros((4, 1, 1)).half().numpy()
    tokens = (torch.tensor(reference).int().numpy(), torch.tensor(full).int().numpy())
    states = States(nothing, *tokens, top=nothing, top_shares=nothing)  # type: ignore[arg-type]
    go, leave, stop = 0, 1, 2
    assert labels(said, states).tolist() == [
        [leave, leave, leave, leave],
        [go, leave, leave, leave],
        [go, go, go, leave],
        [stop, stop, stop, stop],
    ]


def test_labels_by_agreement_ask_for_full_depth_at_each_exit_point() -> None:
    """Exit only where this very exit point says what full depth says; stop where full depth errs, whoever agrees."""
    said = torch.tensor([[7, 1, 7], [1, 7, 1], [1, 1, 1]])
    nothing = torch.zeros((3, 1, 1)).half().numpy()
    tokens = (torch.tensor([7, 7, 7]).int().numpy(), torch.tensor([7, 7, 1]).int().numpy())
    states = States(nothing, *tokens, top=nothing, top_shares=nothing)  # type: ignore[arg-type]
    go, leave, stop = 0, 1, 2
    assert labels(said, states, "agrees").tolist() == [
        [leave, go, leave, leave],
        [go, leave, go, leave],
        [stop, stop, stop, stop],
    ]


def test_who_left_before_is_the_place_before_within_a_window() -> None:
    go, leave, stop = 0, 1, 2
    label = torch.tensor([[go, leave], [leave, leave], [stop, stop], [leave, leave], [go, leave], [go, leave]])
    assert left_before(label, [4, 2]).tolist() == [False, False, True, False, False, False]


def test_calibrated_probabilities_are_shares(world: TrainSpec, tmp_path: Path) -> None:
    """On code like that it was calibrated on, the mean probability of each class is the class's share."""
    spec = changed(
        world, controller={"kind": "calibrated", "epochs": 30}, holdout=world.corpus[:1], corpus=world.corpus[1:],
        holdout_tokens=1000,
    )  # fmt: skip
    manifest = train(spec, tmp_path / "bundle")
    assert manifest.controller == "calibrated"
    for point, classes in manifest.reliability.items():
        assert set(classes) == {"exit", "stop"}
        for name, bins in classes.items():
            places = sum(count for *_, count in bins)
            said = sum(mean * count for mean, _, count in bins) / places
            so = sum(share * count for _, share, count in bins) / places
            assert so == pytest.approx(manifest.scores[point][f"{name}_base_rate"])
            assert said == pytest.approx(so, abs=0.15)


def test_scores_of_a_class() -> None:
    score = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    so = torch.tensor([True, False, True, False, False, False, False, True])
    assert auroc(score, so) == pytest.approx((5 + 4 + 0) / 15)
    assert auroc(torch.ones(8), so) == 0.5
    assert lift(score, so, 0.3) == pytest.approx(1 / (3 / 8))
    assert lift(score, so, 0.5) == pytest.approx((2 / 3) / (3 / 8))
    assert lift(score, ~so & so, 0.3) == auroc(score, ~so & so) == 0
    bins = reliability_bins(torch.tensor([0.02, 0.08, 0.95, 1.0]), torch.tensor([False, True, True, True]))
    assert bins == [(pytest.approx(0.05), 0.5, 2), (pytest.approx(0.975), 1.0, 2)]


def test_a_start_whose_untied_heads_do_not_fit_is_refused(world: TrainSpec, tmp_path: Path) -> None:
    world = changed(world, head="untied", controller=None, epochs=1)
    train(world, tmp_path / "first")
    with pytest.raises(BadInput, match="untied heads over a shortlist of 64, the spec wants 32; make them the same"):
        train(changed(world, start=str(tmp_path / "first"), shortlist=32), tmp_path / "second")
    with pytest.raises(BadInput, match="has heads 'untied' of rank None, the spec wants 'tied'"):
        train(changed(world, start=str(tmp_path / "first"), head="tied"), tmp_path / "second")
    assert not (tmp_path / "second.work").exists()


def test_a_start_of_another_model_is_refused(world: TrainSpec, tmp_path: Path) -> None:
    """Its tensors may fit in size, and would be worth nothing."""
    train(changed(world, controller=None, epochs=1), tmp_path / "first")
    note = tmp_path / "first" / MANIFEST
    note.write_text(json.dumps(json.loads(note.read_text()) | {"weights_hash": "0" * 64}))
    with pytest.raises(BadInput, match="weights"):
        train(changed(world, start=str(tmp_path / "first")), tmp_path / "second")
    assert not (tmp_path / "second.work").exists()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"exit_points": (4, 2)}, "must rise, each once; give [2, 4]"),
        ({"exit_points": (2, 9)}, "9 is outside the model; give layers from 1 to 6"),
        ({"corpus": ["no_such_package"]}, "'no_such_package' is neither a folder nor an installed package"),
        ({"shortlist": 100_000}, "shortlist is 100000, but the vocabulary"),
        ({"context": 4096, "tokens": 9000, "holdout_tokens": 9000}, "6 files are no python of 4096 tokens or more"),
    ],
)
def test_a_spec_that_cannot_be_trained_is_refused(
    world: TrainSpec, tmp_path: Path, fields: dict[str, object], says: str
) -> None:
    with pytest.raises(BadInput) as refused:
        train(changed(world, **fields), tmp_path / "bundle")
    assert says in str(refused.value)
    assert not (tmp_path / "bundle").exists()
    assert not (tmp_path / "bundle.work").exists()


def test_candidates_estimate_sums_over_all_outputs_without_bias(world: TrainSpec, tmp_path: Path) -> None:
    """Many draws together say what the whole shortlist says: the partition function and the target's cross term."""
    spec = changed(world, candidates=24)
    trainers: list[HeadTrainer] = []

    class Made(Exception):
        pass

    def stop(self: HeadTrainer, on_progress: object) -> None:
        trainers.append(self)
        raise Made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadTrainer, "train", stop)
        with pytest.raises(Made):
            train(spec, tmp_path / "bundle")
    [trainer] = trainers
    logits, certain = torch.linspace(-2, 2, 64), torch.tensor([3, 60, -1, 3])
    sums = []
    for draw in range(2000):
        chosen = trainer._candidates(certain, np.random.default_rng(draw))
        assert len(chosen.outputs) == 24
        assert {3, 60} <= set(chosen.outputs.tolist())
        sums.append(torch.exp(logits[chosen.outputs] + chosen.logs).sum().item())
    assert np.mean(sums) == pytest.approx(logits.exp().sum().item(), rel=0.01)
    everything = trainer._candidates(torch.arange(60), np.random.default_rng(0))
    assert everything.outputs.tolist() == list(range(64))
    assert everything.logs.abs().max() == 0


@pytest.mark.parametrize("target", ["full", "choice", "reference", "mix"])
def test_targets_are_distributions_over_all_outputs(target: Target) -> None:
    """What a shortlist has no place for is spread evenly: the head is to be unsure there."""
    full = torch.tensor([[0.5, 0.25, 0.0, 0.0], [0.25, 0.0, 0.0, 0.0]])
    wanted = targets(target, 0.5, full, full.sum(dim=1, keepdim=True), torch.tensor([0, -1]), torch.tensor([1, -1]), 4)
    assert wanted.sum(dim=1).tolist() == pytest.approx([1, 1])
    rows = {
        "full": [0.5625, 0.3125, 0.0625, 0.0625],
        "choice": [1, 0, 0, 0],
        "reference": [0, 1, 0, 0],
        "mix": [0.28125, 0.65625, 0.03125, 0.03125],
    }
    assert wanted[0].tolist() == pytest.approx(rows[target])
    if target in ("choice", "reference"):
        assert wanted[1].tolist() == [0.25] * 4


@pytest.mark.parametrize("field", ["tokens", "holdout_tokens"])
def test_fewer_tokens_than_a_window_has_are_refused(world: TrainSpec, field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is 1000, less than one window of context 2048"):
        changed(world, context=2048, **{"tokens": 4096, "holdout_tokens": 4096, field: 1000})


def test_what_is_measured_must_not_have_been_learned(world: TrainSpec, tmp_path: Path) -> None:
    inside = str(Path(world.corpus[0]) / "pkg")
    with pytest.raises(BadInput, match="overlaps the corpus source"):
        train(changed(world, holdout=[inside]), tmp_path / "bundle")


def test_neither_a_bundle_nor_another_specs_checkpoint_is_overwritten(world: TrainSpec, tmp_path: Path) -> None:
    with pytest.raises(PowerCut):
        train(world, tmp_path / "bundle", cut_at("heads", 1))
    with pytest.raises(BadInput, match="the checkpoint of another spec"):
        train(changed(world, seed=1), tmp_path / "bundle")
    train(world, tmp_path / "bundle")
    with pytest.raises(BadInput, match="holds a bundle or a model already"):
        train(world, tmp_path / "bundle")


def test_a_folder_with_anything_in_it_is_never_replaced(world: TrainSpec, tmp_path: Path) -> None:
    precious = tmp_path / "mine" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    with pytest.raises(BadInput, match="is there and not empty"):
        train(world, precious.parent)
    (tmp_path / "fresh.work").mkdir()
    with pytest.raises(BadInput, match="not of our making"):
        train(world, tmp_path / "fresh")
    assert precious.read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert train(world, tmp_path / "empty").exit_points == world.exit_points
