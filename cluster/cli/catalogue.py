"""What is known by name: models, benchmarks, policies."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from cluster.cli.options import JsonFlag, ServerUrl
from cluster.cli.output import print_json, print_table
from cluster.cli.start import service

if TYPE_CHECKING:
    from cluster.known import Known
    from workers.benchmarks.sample import Sample


def models(server: ServerUrl = None, as_json: JsonFlag = False) -> None:
    """The models known by name; folders and hub ids do as well."""
    with service(server=server) as shortstop:
        _print_described(shortstop.models(), as_json)


def benchmarks(context: typer.Context, server: ServerUrl = None, as_json: JsonFlag = False) -> None:
    """The benchmarks known by name; source code and JSONL do as well."""
    if context.invoked_subcommand is None:
        with service(server=server) as shortstop:
            _print_described(shortstop.benchmarks(), as_json)


def show(
    name: Annotated[
        str, typer.Argument(help="A name of the catalogue, or the path of a file that declares a benchmark.")
    ],
    as_json: JsonFlag = False,
) -> None:
    """What a benchmark is, with three of its samples."""
    from workers.benchmarks.catalogue import entry
    from workers.benchmarks.declared import shown

    found = entry(name)
    benchmark = found.load()
    known = {"description": found.description} if found.declaration is None else shown(found.declaration)
    known |= {"content_hash": benchmark.content_hash, "samples": len(benchmark.samples)}
    known |= {"left_out": benchmark.left_out}
    examples = [asdict(sample) for sample in _three(benchmark.samples)]
    if as_json:
        print_json(known | {"examples": examples})
        return
    print(yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=100), end="")
    for example in examples:
        print(f"\n--- {example['name']}: the end of the prompt, and the reference")
        print("".join(example["prompt"].splitlines(keepends=True)[-8:]), end="")
        print(f"⟦{example['reference']}⟧")


def _three(samples: list["Sample"]) -> list["Sample"]:
    """The first, the middle and the last; all where there are fewer."""
    places = sorted({0, len(samples) // 2, len(samples) - 1}) if samples else []
    return [samples[place] for place in places]


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
