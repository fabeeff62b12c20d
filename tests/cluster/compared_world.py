"""Jobs that can be told apart: references that full depth writes exactly, and exits that spoil them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from small_world import World

from cluster import jobs
from db import results
from db.records import JobState
from db.session import Database, open_database

METRICS = ["es", "accepted", "em"]


@dataclass(frozen=True)
class Compared:
    """A record with finished jobs."""

    world: World
    url: str
    fields: dict[str, Any]  #: of the spec of `good` and `again`
    good: int  #: what full depth writes is the reference
    again: int  #: the same spec once more
    worse: int  #: the same with a policy in the place of `careful` that leaves much too early
    other: int  #: on other samples under the same name of the benchmark's file

    def spec(self, **changes: Any) -> dict[str, Any]:
        return self.fields | changes


def policies(threshold: float) -> list[Any]:
    """`full`, and one that leaves early: hardly ever, or nearly always."""
    return ["full", {"confidence": {"threshold": threshold, "name": "careful"}}]


def build(world: World, folder: Path, count: int = 96) -> Compared:
    """References are made by a job at full depth, on prompts of 24 files; 48 of them are drawn."""
    url = f"sqlite:///{folder / 'record.db'}"
    prompts = [
        {"id": f"s{i}", "file": f"f{i // 4}", "prompt": f"def g{i}(x):\n    y = {i * 91}\n    ret", "reference": "urn"}
        for i in range(count)
    ]
    db = open_database(url)
    try:
        raw = _jsonl(folder / "raw.jsonl", prompts)
        made = _done(db, world, benchmarks=[_source(raw)], policies=["full"], name="references")
        written = {row.sample.name: row.outcome.text for row in results.completions(db, job_id=made)}
        answered = [prompt | {"reference": written[prompt["id"]]} for prompt in prompts]
        exact = _source(_jsonl(folder / "exact.jsonl", answered)) | {"samples": count // 2}
        fields = world.fields(benchmarks=[exact], policies=policies(0.999), metrics=METRICS, name="nightly")
        good, again = (_done(db, world, **fields) for _ in range(2))
        worse = _done(db, world, **fields | {"policies": policies(0.01)})
        spoiled = [one | {"reference": one["reference"] + "x"} for one in answered]
        (folder / "elsewhere").mkdir()
        named = _source(_jsonl(folder / "elsewhere" / "exact.jsonl", spoiled)) | {"samples": count // 2}
        other = _done(db, world, **fields | {"benchmarks": [named]})
    finally:
        db.close()
    return Compared(world, url, fields, good, again, worse, other)


def _source(file: Path) -> dict[str, Any]:
    return {"jsonl": str(file), "id": "id", "group": "file", "ends": "text"}


def _jsonl(file: Path, lines: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def _done(db: Database, world: World, **fields: Any) -> int:
    job_id = jobs.submit(db, world.spec(**fields))
    assert jobs.work(db, job_id, inline=True) is JobState.DONE
    return job_id
