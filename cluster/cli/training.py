"""`shortstop train`: an exit bundle from a corpus, the backbone frozen."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.options import JsonFlag, Overrides, SpecFile
from cluster.cli.output import note, print_table
from engine.errors import BadInput

if TYPE_CHECKING:
    from engine.exits import ExitsManifest
    from engine.training.spec import TrainSpec


def train(
    spec: SpecFile,
    out: Annotated[str, typer.Option("--out", metavar="FOLDER", help="Where the bundle is written.")],
    overrides: Overrides = None,
    as_json: JsonFlag = False,
) -> None:
    """Train exits for a model; goes on where it was interrupted."""
    from cluster.cli.progress import watch
    from cluster.cli.start import start

    start()
    wanted = _read(spec, overrides or [])
    from engine.training.train import train

    try:
        with watch() as shown:
            manifest = train(
                wanted,
                Path(out).expanduser(),
                lambda now: shown.show(
                    now.stage, now.done, now.total, now.unit, "" if now.loss is None else f"loss {now.loss:.3f}"
                ),
            )
    except KeyboardInterrupt:
        note("interrupted; go on with the same command")
        raise typer.Exit(130) from None
    if as_json:
        print(manifest.model_dump_json(indent=2))
    else:
        print_scores(manifest)
        note(f"exits written to {out}")


def _read(spec: str, overrides: list[str]) -> "TrainSpec":
    from pydantic import ValidationError

    from cluster.spec import complaint, override, read_yaml
    from engine.training.spec import TrainSpec

    try:
        return TrainSpec.model_validate(override(read_yaml(spec), overrides))
    except ValidationError as error:
        raise BadInput(f"spec: {complaint(error)}") from None


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
