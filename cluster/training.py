"""Training as users start it: what must not be learned is looked up by the names of benchmarks."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from engine.training.spec import FineTuneSpec, TrainSpec

if TYPE_CHECKING:
    from engine.exits import ExitsManifest
    from engine.training.workplace import OnProgress


def train(spec: TrainSpec, out: Path, on_progress: "OnProgress" = lambda _: None) -> "ExitsManifest":
    """Train the bundle of a spec into folder `out`. Raises `BadInput`; an interrupted call is gone on with."""
    from engine.training.train import train

    return train(spec, out, on_progress, _texts(spec.benchmarks))


def finetune(spec: FineTuneSpec, out: Path, on_progress: "OnProgress" = lambda _: None) -> Path:
    """Train a model's own weights on a language; gives the folder of the new model. Raises `BadInput`."""
    from engine.training.finetune import finetune

    return finetune(spec, out, on_progress, _texts(spec.benchmarks))


def _texts(benchmarks: list[str]) -> Iterator[tuple[str, str]]:
    """Name and text of all that is asked for: of each source group the longest, as prompts of one file nest."""
    from workers.benchmarks.catalogue import entry

    for name in benchmarks:
        longest: dict[str, str] = {}
        for sample in entry(name).load().samples:
            text = sample.prompt + sample.reference
            if len(text) > len(longest.get(sample.source_group, "")):
                longest[sample.source_group] = text
        yield from ((f"{name} {group}", text) for group, text in longest.items())
