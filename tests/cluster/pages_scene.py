"""A record that shows all that pages have to show: hostile texts, a job that failed, one that waits."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from invented import HOSTILE
from served import Served, serving
from small_world import World

from cluster import jobs
from db import queue
from db.jobs import pause_job
from db.keys import create_key
from db.records import JobState
from db.session import Database, open_database

#: `rouge_l` is what speed is drawn against
METRICS = ["rouge_l", "es", "accepted", "token_agreement"]


@dataclass
class Scene:
    """A server, and what is in its record."""

    served: Served
    db: Database
    world: World
    key: str  #: of alice, with every scope
    reader: str  #: of bob, who may only look
    done: int
    hostile: int  #: done; every text in it is hostile
    other: int  #: done, under the policies of `done` with other thresholds: what `done` is compared with
    dead: int  #: failed: a shard died of an error in hostile words
    waiting: int  #: paused before it was prepared


def write_hostile(file: Path, count: int = 8) -> Path:
    lines = [
        {"id": f"{HOSTILE}{i}", "file": HOSTILE, "prompt": f"# {HOSTILE}\nx = {i}\nret", "reference": f"urn {HOSTILE}"}
        for i in range(count)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@contextmanager
def opened_scene(folder: Path, world: World) -> Iterator[Scene]:
    """The scene on SQLite, behind a server without a fleet."""
    with closing(open_database(f"sqlite:///{folder / 'record.db'}")) as db:
        parts = set_scene(db, world)
        with serving(db.url, folder / "uploads", "--allow", str(world.folder)) as served:
            yield Scene(served, db, world, **parts)


def set_scene(db: Database, world: World) -> dict[str, Any]:
    key = create_key(db, "alice", ["read", "submit", "query", "admin"])[0]
    reader = create_key(db, "bob", ["read"])[0]
    done = jobs.submit(db, world.spec(name="nightly", metrics=METRICS), principal="alice")
    assert jobs.work(db, done, inline=True) is JobState.DONE
    changed = ["full", {"confidence": {"threshold": 0.01, "name": "confidence threshold=0.6"}}]
    other = jobs.submit(db, world.spec(name="the night after", metrics=METRICS, policies=changed), principal="alice")
    assert jobs.work(db, other, inline=True) is JobState.DONE
    prompts = write_hostile(world.folder / "hostile.jsonl")
    source: dict[str, Any] = {"jsonl": str(prompts), "id": "id", "group": "file", "ends": "text"}
    hostile = jobs.submit(db, world.spec(name=HOSTILE, benchmarks=[source]), principal="alice")
    assert jobs.work(db, hostile, inline=True) is JobState.DONE
    dead = jobs.submit(db, world.spec(name="doomed", policies=["full"]), principal="alice")
    _let_a_shard_die(db, dead)
    waiting = jobs.submit(db, world.spec(name="waiting"), principal="somebody")
    pause_job(db, waiting)
    return {
        "key": key,
        "reader": reader,
        "done": done,
        "hostile": hostile,
        "other": other,
        "dead": dead,
        "waiting": waiting,
    }


def _let_a_shard_die(db: Database, job_id: int) -> None:
    jobs.prepare(db, queue.claim(db, "doomed", kind="prepare", job_id=job_id))
    for _ in range(queue.MAX_ATTEMPTS):
        with sqlite3.connect(db.url.removeprefix("sqlite:///")) as connection:
            connection.execute("UPDATE task SET run_after = 0")
            connection.commit()
        lease = queue.claim(db, "doomed", kind="shard", job_id=job_id)
        assert lease is not None
        queue.fail(db, lease, f"RuntimeError: {HOSTILE}")
