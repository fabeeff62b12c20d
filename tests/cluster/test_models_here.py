"""The model of a job on a worker's machine: looked at once for all its workers, and before a weight is loaded."""

import re
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
from cluster.spec import parse_job
from db import jobs as record
from db import queue
from db.session import Database
from engine.device import describe_device_class, find_device
from engine.errors import BadInput, WeightsMismatch
from workers.pinned import Pinned
from workers.shelf import EngineShelf
from workers.worker import Unfit, Worker


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


def test_a_job_for_one_class_of_devices_is_done_by_no_other(
    world: World, db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before a weight is loaded, its shard given back; on a machine of that class it is done, and timed."""
    here = describe_device_class(find_device("cpu"), "float32", 1)
    other = here.replace("cpu ", "cpu other than ")
    for wanted in (other, here):
        jobs.submit(db, world.spec(device_class=wanted, device="auto", threads=1, policies=["full"]))
        jobs.prepare(db, queue.claim(db, "test", kind="prepare"))
    mine, theirs = (Pinned.model_validate(record.job(db, job_id).pinned) for job_id in (2, 1))
    assert (mine.device_class, theirs.device_class, theirs.device) == (here, other, "cpu")
    assert mine.engine != theirs.engine, "a machine that cannot do the one may do the other"
    with monkeypatch.context() as patch:
        patch.setattr(engine.engine, "load_model", lambda *_: pytest.fail("weights were loaded"))
        sentence = f"device_class is {other!r}, but {socket.gethostname()} is {here!r}"
        with pytest.raises(Unfit, match=re.escape(sentence)):
            Worker(db, "wrong", timed=True, cache=tmp_path / "cache").work(1)
    assert set(rows(db, "select state, attempt from task where job_id = 1 and kind = 'shard'")) == {("ready", 0)}
    assert jobs.work(db, 2, inline=True) is record.JobState.DONE
    assert rows(db, "select distinct device_class, timed from timing") == [(here, 1)]


def test_a_class_and_a_device_that_do_not_go_together_are_one_sentence(world: World) -> None:
    assert world.spec(device_class="NVIDIA H100, float32, torch 2.13", device="auto").device == "cuda"
    with pytest.raises(BadInput, match="device is 'cpu', but device_class 'NVIDIA H100' is of cuda; leave one of"):
        parse_job(world.fields(device_class="NVIDIA H100", device="cpu"))
