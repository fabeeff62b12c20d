"""`shortstop fleet` and `shortstop work` as a deployment starts them: what they survive, and what they refuse."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest
from small_world import POLICIES, World, columns, rows, shortstop
from small_world import wait_for as wait_long_for

from cluster import jobs
from cluster.fleet.keeper import Keeper, Orders
from db import jobs as record
from db.session import Database, open_database
from workers.worker import GpuMemory

pytestmark = pytest.mark.timeout(600)
wait_for = partial(wait_long_for, seconds=120.0)


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SHORTSTOP_LEASE_SECONDS", "6")
    return f"sqlite:///{tmp_path / 'record.db'}"


@pytest.fixture
def db(url: str) -> Iterator[Database]:
    with closing(open_database(url)) as database:
        yield database


@pytest.fixture
def fleet(url: str, db: Database) -> Iterator[subprocess.Popen[str]]:
    process = shortstop("fleet", "--workers", "1", "--metrics-port", "0", "--database", url)
    yield process
    process.terminate()
    process.communicate(timeout=90)


def ended(db: Database, job_id: int) -> bool:
    return record.job(db, job_id).state.ended


def test_a_keeper_hears_of_gpus_until_their_supervisor_ends(url: str) -> None:
    keeper = Keeper(Orders(database_url=url), "this test")
    heard = []

    def said() -> Iterator[str]:
        yield "joined\n"
        yield 'gpus: [["node-1", ["GPU-1", 3, 8]], ["node-2", ["GPU-2", 0, 8]]]\n'
        heard.extend(keeper.gpus())

    keeper._listen(said())
    assert heard == [("node-1", GpuMemory("GPU-1", 3, 8)), ("node-2", GpuMemory("GPU-2", 0, 8))]
    assert keeper.gpus() == []


def supervisor_of(keeper: subprocess.Popen[str]) -> psutil.Process | None:
    found = psutil.Process(keeper.pid).children()
    return found[0] if found else None


def test_a_fleet_survives_its_supervisor_and_leaves_nothing_when_it_is_terminated(
    fleet: subprocess.Popen[str], db: Database, world: World, undisturbed: dict[tuple[str, str], tuple[object, ...]]
) -> None:
    """SIGKILL of the supervisor in the middle of a job: the next one goes on. SIGTERM: drained, exit code 0."""
    job_id = jobs.submit(db, world.spec())
    begun = "select 1 from task where kind = 'shard' and state in ('done', 'leased')"
    wait_for("a shard in hand", lambda: rows(db, begun))
    first = supervisor_of(fleet)
    assert first is not None
    left_behind = first.children(recursive=True)
    first.kill()
    wait_for("the job", lambda: ended(db, job_id))
    assert columns(db, job_id) == undisturbed
    assert rows(db, "select max(deaths) from task") == [(0,)], "the supervisor's death is not the shard's"
    assert fleet.stderr is not None
    [place] = re.findall(r"^metrics at (http://127\.0\.0\.1:\d+/metrics)$", fleet.stderr.readline())
    with urlopen(place, timeout=30) as answer:
        assert b'\nshortstop_workers{state="idle"}' in answer.read()
    wait_for("Ray's processes to follow", lambda: not any(child.is_running() for child in left_behind))
    fleet.send_signal(signal.SIGTERM)
    said = fleet.stderr.read()
    assert fleet.wait(timeout=90) == 0, said
    assert [json.loads(line)["event"] for line in said.splitlines() if "supervisor ended" in line]


def test_a_second_fleet_is_refused_or_waits(fleet: subprocess.Popen[str], url: str) -> None:
    wait_for("the first", lambda: supervisor_of(fleet))
    second = shortstop("fleet", "--database", url)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 2
    assert "has a fleet already" in said
    assert f"process {fleet.pid}" in said
    third = shortstop("fleet", "--wait", "--workers", "1", "--database", url)
    try:
        assert third.stderr is not None
        assert third.stderr.readline().startswith("waiting for the fleet of ")
        fleet.terminate()
        wait_for("its turn", lambda: supervisor_of(third))
    finally:
        third.terminate()
        third.communicate(timeout=90)


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1:1", "cannot be reached"),
        ("127.0.0.1:port", "has no port that could be"),
        ("ray://127.0.0.1:10001", "is one for Ray's clients"),
    ],
)
def test_an_address_without_ray_is_one_sentence(
    address: str, sentence: str, url: str, world: World, tmp_path: Path, db: Database
) -> None:
    """The job stays, and can be resumed."""
    spec = world.spec_file(tmp_path / "spec.yaml")
    process = shortstop("run", str(spec), "--ray-address", address, "--database", url)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    [line] = [line for line in said.splitlines() if line.startswith("shortstop:")]
    assert sentence in line
    assert not record.job(db, 1).state.ended
    process = shortstop("fleet", "--ray-address", address, "--database", url)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert sentence in said


def test_a_worker_joins_without_ray_prepares_and_leaves_when_idle(
    url: str, db: Database, world: World, undisturbed: dict[tuple[str, str], tuple[object, ...]]
) -> None:
    good, bad = jobs.submit(db, world.spec()), jobs.submit(db, world.spec(generation={"max_new_tokens": 96}))
    process = shortstop("work", "--until-idle", "0.5", "--database", url)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert record.job(db, bad).state is jobs.JobState.FAILED
    assert record.job(db, good).state is jobs.JobState.DONE
    assert columns(db, good) == undisturbed
    assert "ray" not in " ".join(name for (name,) in rows(db, "select worker from task where worker is not null"))


def test_a_worker_that_is_terminated_gives_its_shard_back(url: str, db: Database, world: World) -> None:
    job_id = jobs.submit(db, world.spec(shard_batches=12))
    process = shortstop("work", "--database", url)
    wait_for("a batch", lambda: rows(db, "select 1 from task where state = 'leased' and done_batches >= 1"))
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert rows(db, f"select state, attempt from task where job_id = {job_id} and state = 'ready'") == [("ready", 0)]
    assert rows(db, "select count(*) from outcome") > [(0,)]


# --- Ray's head is lost


@pytest.mark.slow
def test_a_fleet_takes_the_next_head(
    url: str, db: Database, world: World, undisturbed: dict[tuple[str, str], tuple[object, ...]]
) -> None:
    """Head and nodes are killed in the middle of a job; another cluster appears at the same address."""
    first = _head()
    keeper = shortstop("fleet", "--workers", "1", "--ray-address", "127.0.0.1:6399", "--database", url)
    try:
        more = [{"confidence": {"threshold": one / 100}} for one in range(61, 97)]  # so many that it takes its time
        job_id = jobs.submit(db, world.spec(shard_batches=2, policies=[*POLICIES, *more]))
        done = "select 1 from task where kind = 'shard' and state = 'done'"
        wait_for("a shard done", lambda: rows(db, done))
        _kill(first)
        assert not ended(db, job_id), "the head died too late"
        assert keeper.poll() is None
        second = _head()
        try:
            later = jobs.submit(db, world.spec())  # the first one may be ended by a worker that outlives its raylet
            wait_for("both jobs", lambda: ended(db, job_id) and ended(db, later), seconds=240)
        finally:
            keeper.terminate()
            keeper.wait(90)
            _kill(second)
    finally:
        keeper.kill()
        keeper.communicate()
    assert columns(db, later) == undisturbed
    found = columns(db, job_id)
    assert (len(found), {key: found[key] for key in undisturbed}) == (48 * 40, undisturbed)
    assert rows(db, "select max(deaths) from task") == [(0,)]
    fleets = rows(db, f"select distinct substr(worker, 1, instr(worker, '@') - 2) from task where job_id >= {job_id}")
    assert len(fleets) == 2, "one supervisor a head"


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, 30)


def _head() -> list[psutil.Process]:
    """The processes of a head that was started by hand."""
    before = set(psutil.pids())
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--port", "6399", "--num-cpus", "1",
        "--include-dashboard", "false", "--disable-usage-stats", "--node-ip-address", "127.0.0.1",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    fresh = [psutil.Process(pid) for pid in psutil.pids() if pid not in before]
    return [one for one in fresh if _is_rays(one)]


def _is_rays(process: psutil.Process) -> bool:
    """Started by this test, whose environment it has."""
    try:
        return "ray" in " ".join(process.cmdline()) and process.environ().get("SHORTSTOP_CACHE") == os.environ.get(
            "SHORTSTOP_CACHE"
        )
    except psutil.Error:
        return False


_OF_ANOTHER_VERSION = """
import sys
from cluster.ray_environment import set_up_ray
set_up_ray()
import ray
ray.__version__ = "1.2.3"
from cluster.fleet.supervisor import Fleet
from db.errors import BadInput
from db.session import open_database
try:
    Fleet(open_database(sys.argv[1]), ray_address=sys.argv[2]).__enter__()
except BadInput as error:
    print(error)
"""


def test_another_version_of_ray_is_one_sentence(url: str, db: Database) -> None:
    """The cluster's version is the real one; the driver pretends to be of another."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        command = [sys.executable, "-c", _OF_ANOTHER_VERSION, url, cluster.address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    finally:
        cluster.shutdown()
    [sentence] = done.stdout.splitlines()
    assert "is of another version than this machine's: Ray 2." in sentence, done.stderr
    assert "there, Ray 1.2.3 and Python 3." in sentence


# --- the keeper


def test_a_supervisor_that_ends_is_started_again_after_a_pause_that_grows(
    url: str, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.fleet import keeper as module

    begun: list[float] = []
    keeper = Keeper(Orders(database_url=url), "test")

    def die(self: Any, place: Any) -> int:
        begun.append(time.monotonic())
        if len(begun) == 4:
            keeper.stop()
        return module.LOST

    monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(module, "LONGEST_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(Keeper, "_supervise", die)
    keeper.run()
    pauses = [b - a for a, b in pairwise(begun)]
    assert [pause >= least for pause, least in zip(pauses, (0.05, 0.1, 0.1), strict=True)] == [True] * 3
