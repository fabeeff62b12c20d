"""What is known by name: models, benchmarks, policies."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cluster.cli.options import JsonFlag, ServerUrl
from cluster.cli.output import print_json, print_table
from cluster.cli.start import service

if TYPE_CHECKING:
    from cluster.known import Known


def models(server: ServerUrl = None, as_json: JsonFlag = False) -> None:
    """The models known by name; folders and hub ids do as well."""
    with service(server=server) as shortstop:
        _print_described(shortstop.models(), as_json)


def benchmarks(server: ServerUrl = None, as_json: JsonFlag = False) -> None:
    """The benchmarks known by name; source code and JSONL do as well."""
    with service(server=server) as shortstop:
        _print_described(shortstop.benchmarks(), as_json)


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
