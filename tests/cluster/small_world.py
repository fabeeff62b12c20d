"""A small job on a tiny model, and what must be the same however often its workers die."""

import json
import signal
import sqlite3
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from waiting import wait_for as wait_for

from cluster.spec import JobSpec
from db import results
from db.session import Database

POLICIES: list[Any] = [
    "full",
    {"confidence": {"threshold": 0.6}},
    {"patience": {"patience": 1, "kv": "recompute"}},
    {"sec": {"exit": 0.5, "stop": 0.9, "on_stop": "suppress"}},
]


@dataclass(frozen=True)
class World:
    """A model, exits and prompts on disk."""

    folder: Path
    model: Path
    exits: Path
    prompts: Path

    def spec(self, **changes: Any) -> JobSpec:
        """12 batches of 4 samples in 3 shards under 4 policies, one thread."""
        return JobSpec.model_validate(self.fields(**changes))

    def fields(self, **changes: Any) -> dict[str, Any]:
        return {
            "name": "small",
            "model": str(self.model),
            "exits": str(self.exits),
            "device": "cpu",
            "threads": 1,
            "generation": {"max_new_tokens": 8, "batch_size": 4},
            "benchmarks": [{"jsonl": str(self.prompts), "id": "id", "group": "file", "ends": "text"}],
            "policies": POLICIES,
            "metrics": ["es", "accepted", "token_agreement"],  # without the seconds that importing nltk takes
            "shard_batches": 4,
        } | changes

    def spec_file(self, file: Path, **changes: Any) -> Path:
        file.write_text(json.dumps(self.fields(**changes)))  # JSON is YAML
        return file


def write_prompts(file: Path, count: int = 48) -> Path:
    lines = [
        {
            "id": f"s{i}",
            "file": f"f{i // 5}",
            "prompt": f"def f{i}(x):\n    y = {i * 37}\n    ret",
            "reference": f"urn y + {i}",
        }
        for i in range(count)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def bundle(folder: Path, model: Path, **options: Any) -> Path:
    """An exit bundle with random heads for the model in a folder."""
    from tiny_models import facts_of, make_bundle

    return make_bundle(folder, facts_of(model), **options)


def columns(db: Database, job_id: int) -> dict[tuple[str, str], tuple[Any, ...]]:
    """Text and token columns by policy and sample: what crashes, workers and shards must not change.

    Fails where a sample has two outcomes under one policy.
    """
    found: dict[tuple[str, str], tuple[Any, ...]] = {}
    for row in results.completions(db, job_id=job_id):
        key, outcome = (row.policy, row.sample.name), row.outcome
        assert key not in found, f"two outcomes of {key}"
        tokens = outcome.tokens
        arrays = () if tokens is None else tuple(getattr(tokens, field.name).tolist() for field in fields(tokens))
        found[key] = (outcome.text, outcome.error, outcome.finish, outcome.n_tokens, outcome.shown, *arrays)
    return found


def rows(db: Database, sql: str) -> list[tuple[Any, ...]]:
    """What the tests need to know of a SQLite record and no door tells."""
    with sqlite3.connect(db.url.removeprefix("sqlite:///")) as connection:
        return connection.execute(sql).fetchall()


def shortstop(*arguments: str) -> subprocess.Popen[str]:
    """The command line as a user has it, in a process of its own."""
    command = [str(Path(sys.executable).parent / "shortstop"), *arguments]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=_hear_interrupts
    )


def _hear_interrupts() -> None:
    """A terminal's processes do; one that was started in the background of a script would pass its deafness on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
