"""What is known by name: models, benchmarks, policies."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from cluster.cli.options import DatabaseUrl, JsonFlag, ServerUrl
from cluster.cli.output import print_json, print_table
from cluster.cli.start import opened, service, start
from db.errors import Missing

if TYPE_CHECKING:
    from cluster.known import Known

#: flagged samples that are printed; the JSON has all
_FLAGGED_SHOWN = 20


def models(server: ServerUrl = None, as_json: JsonFlag = False) -> None:
    """The models known by name; folders and hub ids do as well."""
    with service(server=server) as shortstop:
        _print_described(shortstop.models(), as_json)


def benchmarks(context: typer.Context, server: ServerUrl = None, as_json: JsonFlag = False) -> None:
    """The benchmarks known by name; source code and JSONL do as well."""
    if context.invoked_subcommand is None:
        with service(server=server) as shortstop:
            _print_described(shortstop.benchmarks(), as_json)


def overlap(
    benchmark: Annotated[
        str,
        typer.Argument(
            help="A name of the catalogue, the path of a file that declares one, a mapping as in a spec, or the number "
            "of a job, for all of its benchmarks."
        ),
    ],
    corpora: Annotated[
        list[str], typer.Argument(metavar="CORPUS...", help="Folders, files of JSON lines, installed packages.")
    ],
    database_url: DatabaseUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Which samples stand in what a model may have learned from; a report shows their scores apart."""
    from cluster.overlaps import look

    with ExitStack() as stack:
        try:
            db = stack.enter_context(opened(start(database_url), create=False))
        except Missing:
            if benchmark.isdecimal():
                raise
            db = None
        found = look(benchmark, corpora, db)
    if as_json:
        print_json(found)
        return
    print_table(
        ("benchmark", "corpus", "texts", "samples", "judged", "flagged"),
        [
            (one.benchmark, one.overlap.corpus, one.overlap.texts, one.samples, one.overlap.judged, len(flagged))
            for one in found
            for flagged in [one.overlap.flagged]
        ],
    )
    for one in found:
        if not one.kept:
            print(
                f"No job here has {one.benchmark}: its flags are not kept. Look again by the number of a job that has."
            )
        for flagged in one.overlap.flagged[:_FLAGGED_SHOWN]:
            print(f"{flagged.name}: {flagged.shared} of {flagged.runs} runs of twelve tokens, in {flagged.found_in}")
        if len(one.overlap.flagged) > _FLAGGED_SHOWN:
            print(f"… and {len(one.overlap.flagged) - _FLAGGED_SHOWN:,} more; --json has all.")


def show(
    name: Annotated[
        str, typer.Argument(help="A name of the catalogue, or the path of a file that declares a benchmark.")
    ],
    server: ServerUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """What a benchmark is, with three of its samples."""
    with service(server=server) as shortstop:
        found = shortstop.benchmark(name)
    known = found.about or {"description": found.description}
    known |= {"content_hash": found.content_hash, "samples": found.samples, "left_out": found.left_out}
    if as_json:
        print_json(known | {"examples": found.examples})
        return
    print(yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=100), end="")
    for example in found.examples:
        print(f"\n--- {example['name']}: the end of the prompt, and the reference")
        print("".join(example["prompt"].splitlines(keepends=True)[-8:]), end="")
        print(f"⟦{example['reference']}⟧")


def policies(server: ServerUrl = None, as_json: JsonFlag = False) -> None:
    """The policies and their options."""
    with service(server=server) as shortstop:
        rows = shortstop.policies()
    if as_json:
        print_json(rows)
        return
    print_table(
        ("name", "description", "options"),
        [(row.name, row.description, ", ".join(map(_option, row.options))) for row in rows],
    )


def _print_described(rows: "Sequence[Known]", as_json: bool) -> None:
    if as_json:
        print_json(rows)
    else:
        print_table(("name", "description"), [(row.name, row.description) for row in rows])


def _option(option: dict[str, Any]) -> str:
    return option["name"] if option["required"] else f"{option['name']}={option['default']}"
