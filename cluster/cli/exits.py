"""`shortstop exits`: what a bundle is, whether it is whole, and bundles out of other projects' checkpoints."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cluster.cli.options import JsonFlag
from cluster.cli.output import note, print_json, print_table

if TYPE_CHECKING:
    from engine.exits import ExitsManifest

Bundle = Annotated[str, typer.Argument(metavar="EXITS", help="A shipped bundle's name, or the folder of one.")]
ModelName = Annotated[str, typer.Option("--model", metavar="MODEL", help="Name, folder or hub id.")]


def list_exits(as_json: JsonFlag = False) -> None:
    """The bundles that come with Shortstop."""
    from engine.exits import find_bundle, read_manifest, shipped_exits

    found = {name: read_manifest(find_bundle(name)) for name in shipped_exits()}
    if as_json:
        print_json({name: _facts(manifest) for name, manifest in found.items()})
        return
    rows = [(name, *_facts(manifest).values()) for name, manifest in found.items()]
    print_table(("name", *_COLUMNS), rows)


def show(
    exits: Bundle,
    html: Annotated[
        str | None, typer.Option("--html", metavar="FILE", help="Write the controller's reliability diagrams too.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """What a bundle is: for which weights, how it was made, from what, and its held-out scores."""
    from cluster.cli.training import print_scores
    from engine.exits import find_bundle, read_manifest

    manifest = read_manifest(find_bundle(exits))
    if html is not None:
        from cluster.reports.reliability import write_reliability

        write_reliability(manifest, exits, Path(html))
    if as_json:
        print(manifest.model_dump_json(indent=2))
        return
    print_table(("", ""), _facts(manifest).items())
    print()
    print_table(("corpus", "version", "tokens", "hash"), _sources(manifest))
    print()
    print_scores(manifest)
    if html is not None:
        note(f"reliability diagrams written to {html}")


def verify(
    exits: Bundle,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Hold it against this model, not the one that it names."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check a bundle's files, tensors, deltas and the model that it serves; exit code 1 where one does not hold."""
    from engine.exits import find_bundle
    from engine.inspection import inspect

    checks = list(inspect(find_bundle(exits), model))
    if as_json:
        print_json(checks)
    else:
        print_table(("", "", ""), [("ok" if check.holds else "FAULT", check.what, check.says) for check in checks])
    if not all(check.holds for check in checks):
        raise typer.Exit(1)


def import_exits(
    form: Annotated[
        Literal["sec", "layerskip"],
        typer.Argument(metavar="FORM", help="Whose checkpoint it is: sec, layerskip (docs/exits.md has the names)."),
    ],
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A file, or a folder of save_pretrained.")],
    model: ModelName,
    out: Annotated[str, typer.Option("--out", metavar="FOLDER", help="Where the bundle is written.")],
    points: Annotated[
        str, typer.Option("--exit-points", metavar="8,12,…", help="Of layerskip; every layer when absent.")
    ] = "",
    as_json: JsonFlag = False,
) -> None:
    """Take a checkpoint of another project as an exit bundle."""
    from engine.importing import import_bundle

    manifest = import_bundle(form, Path(checkpoint).expanduser(), model, Path(out).expanduser(), _read_points(points))
    if as_json:
        print(manifest.model_dump_json(indent=2))
    else:
        print_table(("", ""), _facts(manifest).items())
        note(f"exits written to {out}")


_COLUMNS = ("model", "weights", "exit points", "heads", "controller", "preview", "tuned weights")


def _facts(manifest: "ExitsManifest") -> dict[str, str]:
    heads = manifest.head if manifest.rank is None else f"{manifest.head} of rank {manifest.rank}"
    if manifest.shortlist is not None:
        heads += f", {manifest.shortlist} tokens"
    values = (
        manifest.model,
        f"{manifest.weights_hash[:12]}…",
        ", ".join(map(str, manifest.exit_points)),
        heads,
        manifest.controller or "none",
        "none" if manifest.preview is None else f"of rank {manifest.preview}",
        "as they came" if manifest.tuned_weights_hash is None else f"{manifest.tuned_weights_hash[:12]}…",
    )
    return dict(zip(_COLUMNS, values, strict=True))


def _sources(manifest: "ExitsManifest") -> list[tuple[str, ...]]:
    return [
        (
            f"{entry.get('source')}{' (held out)' if entry.get('held_out') else ''}",
            str(entry.get("version") or ""),
            str(entry.get("tokens", "")),
            f"{str(entry.get('sha256', ''))[:12]}…",
        )
        for entry in manifest.corpus
    ]


def _read_points(text: str) -> tuple[int, ...]:
    from engine.errors import BadInput

    try:
        return tuple(int(point) for point in text.split(",") if point.strip())
    except ValueError:
        raise BadInput(f"exit-points is {text!r}; give layers with commas between them, like 8,12,16.") from None
