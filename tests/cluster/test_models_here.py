"""The model of a job on a worker's machine: looked at once for all its workers, and before a weight is loaded."""

import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
from small_world import World, rows
from tiny_models import random_model, save

import engine.engine
import engine.loading
from cluster import jobs
from db import jobs as record
from db import queue
from db.session import Database
from engine.errors import BadInput, WeightsMismatch
from workers.pinned import Pinned
from workers.worker import EngineShelf, Unfit, Worker


@pytest.fixture
def model(world: World, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(world.model, tmp_path / "model"))


def prepared(db: Database, world: World, model: Path) -> Pinned:
    job_id = jobs.submit(db, world.spec(model=str(model), exits=None, policies=["full"]))
    jobs.prepare(db, queue.claim(db, "test", kind="prepare"))
    return Pinned.model_validate(record.job(db, job_id).pinned)


@pytest.mark.parametrize("changed", ["weights", "tokenizer"])
def test_another_model_under_the_name_is_refused_before_it_is_loaded(
    world: World, db: Database, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """Red where the hash is looked at when the weights are in memory, or never."""
    pinned = prepared(db, world, model)
    if changed == "weights":
        save(random_model("llama", seed=7), model)
    else:
        tokenizer = model / "tokenizer.json"
        tokenizer.write_text(tokenizer.read_text() + "\n")
    monkeypatch.setattr(engine.engine, "load_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(WeightsMismatch, match=f"{changed} .*on {socket.gethostname()}"):
        EngineShelf(db, tmp_path / "cache").take(pinned)


def test_the_worker_says_so_and_the_job_goes_on_where_the_model_is_right(
    world: World, db: Database, model: Path, tmp_path: Path
) -> None:
    right = Path(shutil.copytree(model, tmp_path / "right"))
    prepared(db, world, model)
    save(random_model("llama", seed=7), model)
    with pytest.raises(Unfit, match=f"on {socket.gethostname()}, but the job was prepared with"):
        Worker(db, "wrong", timed=False, cache=tmp_path / "cache").work(1)
    assert set(rows(db, "select state, attempt from task where kind = 'shard'")) == {("ready", 0)}
    shutil.rmtree(model)
    shutil.copytree(right, model)
    assert jobs.work(db, 1, inline=True) is record.JobState.DONE


def test_a_model_that_is_gone_is_named(world: World, db: Database, model: Path, tmp_path: Path) -> None:
    pinned = prepared(db, world, model)
    shutil.rmtree(model)
    with pytest.raises(BadInput, match=str(model)):
        EngineShelf(db, tmp_path / "cache").take(pinned)


def test_of_workers_that_start_together_one_hashes(
    world: World, db: Database, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red without the lock: each would read all the weights."""
    pinned = prepared(db, world, model)
    monkeypatch.setenv("SHORTSTOP_CACHE", str(tmp_path / "fresh"))
    hashed: list[Path] = []
    real = engine.loading._tensors_hash

    def slowly(files: list[Path]) -> str:
        hashed.append(files[0])
        time.sleep(0.5)
        return real(files)

    monkeypatch.setattr(engine.loading, "_tensors_hash", slowly)
    shelves = [EngineShelf(db, tmp_path / "fresh") for _ in range(4)]
    looking = [threading.Thread(target=shelf._look_at, args=(pinned,)) for shelf in shelves]
    for one in looking:
        one.start()
    for one in looking:
        one.join()
    assert len(hashed) == 1
