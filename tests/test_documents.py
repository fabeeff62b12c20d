"""The documents are true: every command and every line of Python in them is run, on the real model, on less data."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
#: what `exits.yaml` may say, at its least
SMALL_TRAINING = {
    "model": "smollm2-135m",
    "corpus": ["markdown_it"],
    "holdout": ["mdurl"],
    "exit_points": [18, 24],
    "rank": 4,
    "shortlist": 512,
    "tokens": 1000,
    "holdout_tokens": 500,
    "context": 128,
    "epochs": 1,
}


def block(language: str, containing: str, document: str = README) -> str:
    [found] = [text for text in re.findall(rf"```{language}\n(.*?)```", document, re.DOTALL) if containing in text]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place as the README's reader has it: a spec, a source tree, a training spec."""
    folder = tmp_path_factory.mktemp("reader")
    spec = yaml.safe_load(block("yaml", "name: my-first"))
    for benchmark in spec["benchmarks"]:
        benchmark["samples"] = 3
    spec["generation"] = {"max_new_tokens": 6, "batch_size": 3}
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    (folder / "exits.yaml").write_text(yaml.safe_dump(SMALL_TRAINING))
    for number in range(4):
        source = folder / "src" / f"part{number}.py"
        source.parent.mkdir(exist_ok=True)
        source.write_text("\n".join(f"def add_{number}_{i}(a, b):\n    return a + b + {i}\n" for i in range(6)))
    return folder


def environment(folder: Path) -> dict[str, str]:
    here = {"SHORTSTOP_DATABASE_URL": f"sqlite:///{folder / 'record.db'}", "HF_HUB_OFFLINE": "1"}
    return os.environ | here | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.mark.timeout(600)
def test_the_readmes_commands_run_as_written(folder: Path) -> None:
    commands = [line.split("#")[0].strip() for line in block("sh", "shortstop run spec.yaml").splitlines()]
    assert len(commands) >= 6
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=folder, env=environment(folder), capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "<html" in (folder / "report.html").read_text()
    assert (folder / "my-exits" / "exits.json").exists()


@pytest.mark.timeout(600)
def test_the_commands_of_traces_run_as_written(folder: Path) -> None:
    document = (ROOT / "docs" / "traces.md").read_text()
    own = environment(folder) | {"SHORTSTOP_DATABASE_URL": f"sqlite:///{folder / 'traces.db'}"}
    for line in block("sh", "shortstop trace", document).splitlines():
        command = line.split("#")[0].strip()
        done = subprocess.run(command, shell=True, cwd=folder, env=own, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "<!doctype html>" in (folder / "replay.html").read_text()
    assert len((folder / "replay.csv").read_text().splitlines()) == 1 + 2 * 52


@pytest.mark.timeout(600)
def test_the_commands_of_the_study_run_as_written(folder: Path) -> None:
    run_all(folder, "study.md", {0})
    assert "<!doctype html>" in (folder / "study.html").read_text()


@pytest.mark.timeout(600)
def test_the_commands_of_calibration_run_as_written(folder: Path) -> None:
    """Three samples promise nothing, and that is said: no answer but bad input, or that nothing keeps the promise."""
    run_all(folder, "calibrate.md", {0, 1, 2, 3})


def run_all(folder: Path, name: str, codes: set[int]) -> None:
    """Run the commands of a document; the first one, which traces, succeeds."""
    document = (ROOT / "docs" / name).read_text()
    own = environment(folder) | {"SHORTSTOP_DATABASE_URL": f"sqlite:///{folder / f'{name}.db'}"}
    for place, line in enumerate(block("sh", "shortstop trace", document).splitlines()):
        command = line.split("#")[0].strip().replace("samples=160", "samples=3")  # as `folder` has cut the spec
        done = subprocess.run(command, shell=True, cwd=folder, env=own, capture_output=True, text=True)
        assert done.returncode in (codes if place else {0}), f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr


@pytest.mark.timeout(600)
def test_the_readmes_python_runs_as_written(folder: Path) -> None:
    code = block("python", "import shortstop")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment(folder), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def blocks(document: str, *languages: str) -> list[tuple[str, str]]:
    """(language, text) in their order."""
    text = (ROOT / "docs" / document).read_text()
    return re.findall(rf"```({'|'.join(languages)})\n(.*?)```", text, re.DOTALL)


def run_block(language: str, text: str, folder: Path) -> None:
    """A block as one script, every line of which must succeed."""
    command = ["bash", "-euc", text] if language == "sh" else [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"


@pytest.fixture
def reader(folder: Path, tmp_path: Path) -> Path:
    """The reader's place, with a record of its own."""
    shutil.copytree(
        folder, tmp_path / "reader", ignore=shutil.ignore_patterns("record.db*", "my-exits", "job-1", "to-judge*")
    )
    return tmp_path / "reader"


@pytest.mark.timeout(600)
def test_labels_are_made_as_written(reader: Path) -> None:
    for language, text in blocks("labels.md", "sh"):
        run_block(language, text, reader)
    assert "Acceptance rate" in (reader / "report.html").read_text()


@pytest.mark.timeout(600)
def test_scores_are_made_again_as_written(reader: Path) -> None:
    [(language, text)] = [one for one in blocks("benchmarks.md", "sh") if "shortstop rescore" in one[1]]
    run_block(language, text, reader)


@pytest.mark.timeout(900)
def test_neighbours_are_met_as_written(reader: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra lm-eval carries the harness")
    found = blocks("neighbours.md", "sh", "yaml", "python")
    assert [language for language, _ in found] == ["sh", "sh", "sh", "yaml", "sh", "python"]
    for language, text in found:
        if language == "yaml":
            (reader / "double.yaml").write_text(text)
        else:
            run_block(language, text, reader)
    assert list((reader / "harness").rglob("samples_double_*.jsonl"))
