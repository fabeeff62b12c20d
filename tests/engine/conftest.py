"""Models that the engine's tests share: SmolLM2 is loaded once, tiny ones once a kind."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tiny_models import facts_of, make_bundle, open_engine, random_model, save
from transformers import PreTrainedModel

from engine.engine import Engine
from engine.loading import load_model
from engine.training.spec import TrainSpec


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models gain nothing from a second thread, and lose tenfold by it where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model, saved as `save_pretrained` does it."""
    return cache(lambda kind: save(random_model(kind), tmp_path_factory.mktemp(kind.replace(" ", "-"))))


@pytest.fixture(scope="session")
def tiny_bundle(tiny_folder: Callable[[str], Path]) -> Callable[..., Path]:
    """The folder of a random bundle for a tiny model: `tiny_bundle("llama", head="lens", shortlist=64)`."""

    @cache
    def build(kind: str, **bundle: object) -> Path:
        name = "-".join(f"{key}-{value}" for key, value in sorted(bundle.items()))
        return make_bundle(tiny_folder(kind) / f"exits-{name}", facts_of(tiny_folder(kind)), **bundle)

    return build


@pytest.fixture(scope="session")
def tiny_engine(tiny_folder: Callable[[str], Path], tiny_bundle: Callable[..., Path]) -> Callable[..., Engine]:
    """An engine on a tiny model, with a random bundle where its options are given."""
    return cache(lambda kind, **bundle: open_engine(tiny_folder(kind), tiny_bundle(kind, **bundle) if bundle else None))


@pytest.fixture(scope="session")
def _smollm2(_one_thread: None) -> Engine:
    return Engine("smollm2-135m", device="cpu")


@pytest.fixture
def smollm2(_smollm2: Engine) -> Iterator[Engine]:
    """The real model, without exits."""
    yield _smollm2
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2_peer(_smollm2: Engine) -> PreTrainedModel:
    """The same weights as `transformers` runs them."""
    return load_model(_smollm2.facts)


@pytest.fixture
def world(tmp_path: Path, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> TrainSpec:
    """A tiny model, two folders of code to learn from, and one to be measured on."""
    monkeypatch.setenv("SHORTSTOP_CACHE", str(tmp_path / "cache"))
    for name, word in (("one", "alpha"), ("two", "beta"), ("kept", "gamma")):
        for file in range(6):
            path = tmp_path / name / "pkg" / f"m{file}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(f"def {word}_{file}_{i}(x):\n    return x + {i}" for i in range(12)))
    return TrainSpec(
        model=str(tiny_folder("llama")),
        corpus=[str(tmp_path / "one"), str(tmp_path / "two")],
        holdout=[str(tmp_path / "kept")],
        exit_points=(2, 4),
        rank=4,
        shortlist=64,
        tokens=1000,
        holdout_tokens=500,
        context=32,
        epochs=8,
        batch_tokens=64,
        device="cpu",
        save_every=0,
    )
