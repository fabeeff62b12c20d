"""What tests of training share: ends from outside, and specs with a field changed."""

from collections.abc import Callable

from engine.training.spec import TrainSpec
from engine.training.workplace import Progress


class PowerCut(Exception):
    """Ends a training from outside, wherever it is."""


def cut_at(stage: str, done: int) -> Callable[[Progress], None]:
    def on_progress(progress: Progress) -> None:
        if progress.stage == stage and progress.done >= done:
            raise PowerCut

    return on_progress


def changed(spec: TrainSpec, **fields: object) -> TrainSpec:
    return TrainSpec.model_validate(spec.model_dump() | fields)
