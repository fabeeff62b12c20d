"""docs/compare.md, docs/gates.md and docs/ci.md are true: their gate is one, their CI files are YAML, and every command
and option that they name is there."""

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from cluster.cli import app
from cluster.comparing.sides import parse_side
from cluster.gates import Gate, Rule, parse_gate

DOCS = Path(__file__).parents[2] / "docs"


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)


def commands(text: str) -> list[list[str]]:
    lines = [line.split("  #")[0] for line in text.splitlines()]
    found = [re.search(r"shortstop (?:run|gate|compare) .*", line) for line in lines]
    return [shlex.split(one[0].split(" > ")[0])[1:] for one in found if one]


def test_the_gate_is_one_and_every_field_is_told() -> None:
    [written] = blocks("gates.md", "yaml")
    assert len(parse_gate(yaml.safe_load(written)).rules) == 5
    text = (DOCS / "gates.md").read_text()
    for field in (*Rule.model_fields, *Gate.model_fields):
        assert f"`{field}`" in text, field
    assert f"; {Rule(metric='es', max_loss=0).margin} when absent" in text
    assert f"; {Gate(rules=[Rule(metric='es', max_loss=0)]).confidence} when absent" in text


def test_ci_files_are_yaml() -> None:
    action, pipeline = (yaml.safe_load(block) for block in blocks("ci.md", "yaml"))
    steps = action["jobs"]["gate"]["steps"]
    assert any("shortstop gate" in step.get("run", "") for step in steps)
    assert pipeline["completions"]["allow_failure"] == {"exit_codes": 3}


@pytest.mark.parametrize("name", ["compare.md", "gates.md", "ci.md"])
def test_every_command_and_option_is_there(name: str) -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = [one for language in ("sh", "yaml") for block in blocks(name, language) for one in commands(block)]
    assert found
    for command, *arguments in found:
        options = {option for one in known[command].params for option in (*one.opts, *one.secondary_opts)}
        assert {argument for argument in arguments if argument.startswith("--")} <= options, arguments
        if command == "compare":
            sides = [one for one in arguments[:2] if not one.startswith("--")]
            assert [str(parse_side(one)) for one in sides] == sides
