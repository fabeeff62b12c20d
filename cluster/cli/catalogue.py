"""What is known by name: models, benchmarks, policies."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from cluster.cli.options import JsonFlag
from cluster.cli.output import print_json, print_table

if TYPE_CHECKING:
    from engine.spec import PolicySpec
    from workers.benchmarks.sample import Sample


def models(as_json: JsonFlag = False) -> None:
    """The models known by name; folders and hub ids do as well."""
    from engine.loading import models

    _print_described(models, as_json)


def benchmarks(context: typer.Context, as_json: JsonFlag = False) -> None:
    """The benchmarks known by name; source code and JSONL do as well."""
    from workers.benchmarks.catalogue import benchmarks

    if context.invoked_subcommand is None:
        _print_described(benchmarks, as_json)


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


def policies(as_json: JsonFlag = False) -> None:
    """The policies and their options."""
    from engine.spec import policies

    rows = [_policy(kind, spec) for kind, spec in policies.items()]
    if as_json:
        print_json(rows)
        return
    print_table(
        ("name", "description", "options"),
        [(row["name"], row["description"], ", ".join(map(_option, row["options"]))) for row in rows],
    )


def _print_described(entries: Mapping[str, Any], as_json: bool) -> None:
    rows = [{"name": name, "description": entry.description} for name, entry in entries.items()]
    if as_json:
        print_json(rows)
    else:
        print_table(("name", "description"), [tuple(row.values()) for row in rows])


def _policy(kind: str, spec: "type[PolicySpec]") -> dict[str, Any]:
    fields = spec.model_json_schema()
    options = [
        {"name": name, "required": name in fields.get("required", []), **_said(field)}
        for name, field in fields.get("properties", {}).items()
        if name != "name"
    ]
    options.sort(key=lambda option: not option["required"])
    return {"name": kind, "description": " ".join((spec.__doc__ or "").split()), "options": options}


def _said(field: dict[str, Any]) -> dict[str, Any]:
    return {
        key: field[key]
        for key in ("type", "const", "enum", "minimum", "maximum", "default", "description")
        if key in field
    }


def _option(option: dict[str, Any]) -> str:
    return option["name"] if option["required"] else f"{option['name']}={option['default']}"
