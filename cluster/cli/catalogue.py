"""What is known by name: models, benchmarks, policies."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cluster.cli.options import JsonFlag
from cluster.cli.output import print_json, print_table

if TYPE_CHECKING:
    from engine.spec import PolicySpec


def models(as_json: JsonFlag = False) -> None:
    """The models known by name; folders and hub ids do as well."""
    from engine.loading import models

    _print_described(models, as_json)


def benchmarks(as_json: JsonFlag = False) -> None:
    """The benchmarks known by name; source code and JSONL do as well."""
    from workers.benchmarks.catalogue import benchmarks

    _print_described(benchmarks, as_json)


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
