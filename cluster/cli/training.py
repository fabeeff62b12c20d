"""`shortstop train`: an exit bundle from a corpus, the backbone frozen or tuned; or the model itself, fine-tuned."""

import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cluster.cli.options import JsonFlag, Overrides, SpecFile
from cluster.cli.output import note, print_table
from engine.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.exits import ExitsManifest
    from engine.spec import Spec
    from engine.training.workplace import OnProgress, Progress

    SpecT = TypeVar("SpecT", bound=Spec)


def train(
    spec: SpecFile,
    out: Annotated[str, typer.Option("--out", metavar="FOLDER", help="Where the bundle, or the model, is written.")],
    overrides: Overrides = None,
    finetune: Annotated[
        bool, typer.Option("--finetune", help="Train the model's own weights on the language first: a model, no exits.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train exits for a model, or with --finetune the model; goes on where it was interrupted."""
    from cluster import training
    from cluster.cli.start import start
    from engine.training.spec import FineTuneSpec, TrainSpec

    start()
    if finetune:
        wanted_model = _read(FineTuneSpec, spec, overrides or [])
        with _shown() as on_progress:
            folder = training.finetune(wanted_model, Path(out), on_progress)
        note(f"model written to {folder}; name this folder as `model` to train exits for it")
        return
    wanted = _read(TrainSpec, spec, overrides or [])
    with _shown() as on_progress:
        manifest = training.train(wanted, Path(out), on_progress)
    if as_json:
        print(manifest.model_dump_json(indent=2))
    else:
        print_scores(manifest)
        note(f"exits written to {out}")


@contextmanager
def _shown() -> "Iterator[OnProgress]":
    """Shows how far training is; Ctrl-C and a loss that is no number end it in a sentence."""
    from cluster.cli.progress import watch
    from engine.training.checkpoint import NotFinite

    try:
        with watch() as shown:
            rate = _Rate()
            yield lambda now: shown.show(now.stage, now.done, now.total, now.unit, f"{_losses(now)}{rate.of(now)}")
    except KeyboardInterrupt:
        note("interrupted; go on with the same command")
        raise typer.Exit(130) from None
    except NotFinite as error:
        note(f"{error}.")
        raise typer.Exit(1) from None


class _Rate:
    """How fast a stage goes, since this process began it, and how long it will take."""

    def __init__(self) -> None:
        self._stage, self._began, self._first = "", 0.0, 0

    def of(self, now: "Progress") -> str:
        if now.stage != self._stage:
            self._stage, self._began, self._first = now.stage, time.monotonic(), now.done
        rate = (now.done - self._first) / max(1e-9, time.monotonic() - self._began)
        if rate <= 0:
            return ""
        left = (now.total - now.done) / rate
        return f"  {rate:,.0f} {now.unit}/s, {left / 60:.0f} min left"


def _read(kind: "type[SpecT]", spec: str, overrides: list[str]) -> "SpecT":
    from pydantic import ValidationError

    from cluster.spec import complaint, override, read_yaml

    try:
        return kind.model_validate(override(read_yaml(spec), overrides))
    except ValidationError as error:
        raise BadInput(f"spec: {complaint(error)}") from None


def _losses(now: "Progress") -> str:
    """The loss, and that of each exit point."""
    if now.loss is None:
        return ""
    exits = " ".join(f"{point}: {loss:.2f}" for point, loss in now.exits.items())
    return f"loss {now.loss:.3f}" + (f", exits {exits}" if exits else "")


def print_scores(manifest: "ExitsManifest") -> None:
    """Held-out scores, a row an exit point."""
    columns = sorted({name for scores in manifest.scores.values() for name in scores})
    print_table(
        ("exit", *(column.replace("_", " ") for column in columns)),
        [
            (point, *(f"{scores[column]:.3f}" if column in scores else "" for column in columns))
            for point, scores in manifest.scores.items()
        ],
    )
