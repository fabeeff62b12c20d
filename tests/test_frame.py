"""The frame: what a newcomer is promised by README and package is there, and the front doors are light."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from typer.main import get_command

import shortstop
from cluster.cli import app
from cluster.spec import parse_job
from engine.training.spec import TrainSpec

ROOT = Path(__file__).parents[1]
WINGS = ("cluster", "workers", "engine", "db")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = ("torch", "transformers", "ray", "sqlalchemy", "pandas", "numpy")


def modules_after(code: str) -> set[str]:
    """The heavy modules that a fresh process has imported after `code`."""
    look = f"import sys\ntry:\n    {code}\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    look += f"print('HEAVY', *[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("command", ["--help", "run --help", "query --help", "train --help", "--version", "db --help"])
def test_help_imports_nothing_heavy(command: str) -> None:
    """`shortstop --help` answers in a blink."""
    code = f"sys.argv = ['shortstop', *{command.split()}]; from cluster.cli import main; main()"
    assert modules_after(code) == set()


def test_importing_the_api_and_the_specs_imports_nothing_heavy() -> None:
    assert modules_after("import shortstop; dir(shortstop)") == set()
    assert modules_after("import cluster.spec, cluster.settings, workers.benchmarks.spec, engine.spec") <= {"numpy"}


def test_policies_answers_without_torch() -> None:
    code = "sys.argv = ['shortstop', 'policies', '--json']; from cluster.cli import main; main()"
    assert "torch" not in modules_after(code)


def test_every_public_name_is_there_and_known_to_type_checkers() -> None:
    assert shortstop.__all__ == sorted(shortstop.__all__)
    assert dir(shortstop) == shortstop.__all__
    for name in shortstop.__all__:
        assert getattr(shortstop, name).__name__ == name
    [block] = [node for node in ast.parse((ROOT / "shortstop.py").read_text()).body if isinstance(node, ast.If)]
    imports = {f"{node.module}.{alias.name}" for node in block.body for alias in node.names}
    assert imports == {f"{home}.{name}" for name, home in shortstop._HOMES.items()}
    with pytest.raises(AttributeError, match="no attribute 'engin'"):
        getattr(shortstop, "engin")  # noqa: B009


def test_no_wing_imports_the_front_door() -> None:
    """import-linter does not see single modules."""
    for file in (file for wing in WINGS for file in (ROOT / wing).rglob("*.py")):
        assert not re.search(r"^\s*(import|from) shortstop\b", file.read_text(), re.MULTILINE), file


def test_every_example_is_a_spec() -> None:
    files = list((ROOT / "examples").rglob("*.yaml"))
    assert ROOT / "examples" / "demo.yaml" in files
    for file in files:
        fields = yaml.safe_load(file.read_text())
        if "corpus" in fields:
            TrainSpec.model_validate(fields)
        else:
            parse_job(fields)


def test_the_demo_is_what_was_promised() -> None:
    """At least 100 HumanEval lines under full, confidence, patience and two settings of SEC."""
    spec = parse_job(yaml.safe_load((ROOT / "examples" / "demo.yaml").read_text()))
    assert [policy.kind for policy in spec.policies] == ["full", "confidence", "patience", "sec", "sec"]
    assert [(asked.benchmark, asked.samples >= 100) for asked in spec.benchmarks] == [("humaneval-lines", True)]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", ".ci/run", ".pre-commit-config.yaml"])
def test_make_targets_that_are_named_exist(document: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)\b", (ROOT / document).read_text()))
    assert {"test", "lint"} <= named | {"test", "lint"} <= targets
    assert named <= targets


def test_commands_and_names_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"^shortstop ([a-z]+(?:-[a-z]+)*)", text, re.MULTILINE)) <= commands
    assert set(re.findall(r"shortstop\.([a-z_]+)\(", text)) <= set(shortstop.__all__)
    [spec] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    parse_job(yaml.safe_load(spec))


def test_constraints_pin_what_the_package_asks_for() -> None:
    """Every dependency is pinned inside its range, to a version that any index may hold."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    assert not [line for line in lines if "+" in line or "/" in line or "@" in line]
    for requirement in map(Requirement, chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())):
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_version_is_the_packages() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "shortstop", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"shortstop {PROJECT['version']}\n"
    assert version("shortstop") == PROJECT["version"]


def test_the_wheel_carries_the_data_that_the_code_reads(tmp_path: Path) -> None:
    """Exits, migrations and templates are found where Shortstop was installed and not only in a clone."""
    for wing in WINGS:
        shutil.copytree(ROOT / wing, tmp_path / wing, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("shortstop.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path / file)
    build = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    packed = set(zipfile.ZipFile(tmp_path / done.stdout.split()[-1]).namelist())
    for folder in ("engine/bundles", "db/migrations", "cluster/reports/templates"):
        files = {str(file.relative_to(tmp_path)) for file in (tmp_path / folder).rglob("*") if file.is_file()}
        assert files <= packed
    assert "shortstop.py" in packed
    assert not [name for name in packed if name.startswith("tests")]
