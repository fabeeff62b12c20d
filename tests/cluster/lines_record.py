"""A record with one finished job of eight samples, which end with their line and have tests; copied for each test."""

import json
import shutil
from contextlib import closing
from pathlib import Path

from small_world import World

from cluster import jobs
from cluster.spec import parse_job
from db.backup import backup
from db.session import open_database

COUNT = 8


def prompt(number: int) -> str:
    return f"def f{number}(x):\n    return"


def make_record(world: World, folder: Path) -> Path:
    """Job 1 under two policies, and beside it the benchmark's file. Returns the folder."""
    lines = [
        {
            "id": f"s{i}",
            "file": f"f{i}",
            "prompt": prompt(i),
            "reference": f" x + {i}",
            "test": f"assert f{i}(1) == {1 + i}",
        }
        for i in range(COUNT)
    ]
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    benchmark = {"jsonl": str(folder / "lines.jsonl"), "id": "id", "group": "file", "test": "test", "ends": "line"}
    policies = ["full", {"confidence": {"threshold": 0.6}}]
    metrics = ["em", "es", "token_agreement", "accepted", "first_divergence"]
    with closing(open_database(f"sqlite:///{folder / 'record.db'}")) as db:
        job = jobs.submit(db, parse_job(world.fields(benchmarks=[benchmark], policies=policies, metrics=metrics)))
        assert (job, jobs.work(db, job, inline=True)) == (1, jobs.JobState.DONE)
        backup(db, folder / "copy.db")
    return folder


def copied(made: Path, folder: Path) -> str:
    """The URL of a copy of the record in the folder."""
    shutil.copy(made / "copy.db", folder / "record.db")
    shutil.copy(made / "lines.jsonl", folder)
    return f"sqlite:///{folder / 'record.db'}"
