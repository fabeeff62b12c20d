"""`make bench-cluster`: what a fleet costs and keeps up. No figure is asserted; they are printed and kept.

Where scale itself is measured the engine is replaced by one that sleeps a known time (tests/sleeping.py): the queue,
the record, Ray and the supervisor are the real ones. BENCH_ACTORS in the environment: 64 when absent.
"""

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import event, text

from cluster import jobs
from cluster.ray_environment import set_up_ray
from cluster.spec import JobSpec
from db import events, queue
from db import jobs as record
from db.events import What
from db.session import Database, open_database
from tests.bench import postgresql
from tests.bench.measure import Row, printed, summarise, write

set_up_ray()
from sleeping import SleepingFleet, running, sleeping_job  # noqa: E402  (it imports Ray)

from cluster.fleet.supervisor import Fleet  # noqa: E402

ACTORS = int(os.environ.get("BENCH_ACTORS", 64))
NODES = 4
SHARD_SECONDS = 2.0
DEADLINE_SECONDS = 600.0
ROUNDS = 10


@contextmanager
def ray_nodes(cpus: int, count: int) -> Iterator[Any]:
    """A cluster of several nodes on this machine: a head without cores, and `count` nodes that say they have `cpus`."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.fleet_nodes = [cluster.add_node(num_cpus=cpus) for _ in range(count)]
    try:
        yield cluster
    finally:
        cluster.shutdown()


def wait_for(what: str, look: Callable[[], Any], every: float = 0.05) -> Any:
    """The first true answer. every: seconds between two looks, which are transactions, too."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        if answer := look():
            return answer
        time.sleep(every)
    sys.exit(f"not seen within {DEADLINE_SECONDS:.0f} s: {what}")


def ended(db: Database, job_id: int) -> bool:
    return record.job(db, job_id).state.ended


def asked(db: Database, sql: str) -> Any:
    with db.read() as connection:
        return connection.execute(text(sql)).scalar_one()


# --- real workers ----------------------------------------------------------------------------------------------------


def two_workers(db: Database, pairs: int = 5) -> Row:
    """Batches a second of two real workers over those of one, in turn; counted when each has done its first two."""
    spec = JobSpec.model_validate(
        {
            "model": "smollm2-135m",
            "device": "cpu",
            "threads": 1,
            "generation": {"max_new_tokens": 8, "batch_size": 8},
            "benchmarks": [{"benchmark": "humaneval-lines", "samples": 160}],
            "policies": ["full"],
            "metrics": ["es"],
            "shard_batches": 1,
        }
    )
    rate_of(db, spec, 1)  # the kernels are measured, the files are read
    ratios = [rate_of(db, spec, 2) / rate_of(db, spec, 1) for _ in range(pairs)]
    return summarise("2 real workers over 1, one thread each, batch 8", ratios, "x", at_least=1.7)


def rate_of(db: Database, spec: JobSpec, workers: int) -> float:
    """Batches a second."""
    job_id = jobs.submit(db, spec)
    jobs.prepare(db, queue.claim(db, "bench", kind="prepare", job_id=job_id))
    seen: list[tuple[float, int]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            done = record.batches(db, job_id)[0]
            if not seen or done > seen[-1][1]:
                seen.append((time.monotonic(), done))

    thread = threading.Thread(target=watch)
    thread.start()
    with Fleet(db, [job_id], workers=workers) as fleet:
        fleet.run()
    over.set()
    thread.join()
    steady = [(at, done) for at, done in seen if done >= 2 * workers]
    (began, first), (ends, last) = steady[0], steady[-1]
    return (last - first) / (ends - began)


# --- scale -----------------------------------------------------------------------------------------------------------


def scale(db: Database, cluster: Any) -> Iterator[Row]:
    """Many actors on several nodes, shards of two batches and two seconds."""
    shards = ACTORS * 20
    with running(
        SleepingFleet(db, workers=ACTORS, ray_address=cluster.address, idle_seconds=600, ready_seconds=600)
    ) as fleet:
        warm = sleeping_job(db, ACTORS * 500, SHARD_SECONDS, shard_batches=1)
        wait_for("all actors", lambda: len([m for m in fleet._crew.members if m.node]) == ACTORS, every=1)
        record.cancel_job(db, warm)
        wait_for("free hands", lambda: not any(pulse.task_id for pulse in fleet.pulses()), every=1)
        yield from first_claims(db)
        job_id = sleeping_job(db, shards * 2, SHARD_SECONDS / 2, shard_batches=2)
        wait_for("full swing", lambda: done_shards(db, job_id) >= ACTORS, every=1)
        before = standing(db, job_id)
        wait_for("most of it", lambda: done_shards(db, job_id) >= shards - 2 * ACTORS, every=2)
        after = standing(db, job_id)
        wait_for("the end", lambda: ended(db, job_id))
        seconds = after["at"] - before["at"]
        done = after["done"] - before["done"]
        ideal = ACTORS / SHARD_SECONDS
        share = done / seconds / ideal
        yield one(f"{ACTORS} actors on {NODES} nodes: share of ideal throughput", share, "", at_least=0.95)
        control = (after["control"] - before["control"]) / seconds
        yield one("control plane: supervisor, GCS and raylets", control, "cores", at_most=0.5)
        supervisor = (after["supervisor"] - before["supervisor"]) / done * 1000
        yield one("supervisor: CPU seconds for 1,000 shards", supervisor, "s")
        own = after["own transactions"] - before["own transactions"]
        yield one("database: transactions of the supervisor (and of this) a second", own / seconds, "/s")
        transactions = (after["transactions"] - before["transactions"] - own) / seconds / ACTORS
        yield one("database: transactions a worker and second", transactions, "/s", at_most=1.5)
        yield tail(db)
        undisturbed = took(db, ACTORS * 12)
        disturbed = took(db, ACTORS * 12, lambda: cluster.fleet_nodes[0].kill_raylet())
        name = f"a node with {ACTORS // NODES} of {ACTORS} actors lost: time over undisturbed"
        yield one(name, disturbed / undisturbed, "x", at_most=1.3)


def one(name: str, value: float, unit: str, **wanted: float) -> Row:
    """A figure that was measured once."""
    return Row(name, value, value, value, unit, **wanted)


def done_shards(db: Database, job_id: int) -> int:
    return record.progress(db, job_id).shards.get("done", 0)


def standing(db: Database, job_id: int) -> dict[str, float]:
    """What is compared at two moments."""
    own = psutil.Process()
    mine = sum(own.cpu_times()[:2])
    control = mine + sum(sum(child.cpu_times()[:2]) for child in own.children() if is_ray(child))
    return {
        "at": time.monotonic(),
        "done": float(done_shards(db, job_id)),
        "control": control,
        "supervisor": mine,
        "own transactions": float(_begun[0]),
        "transactions": float(asked(db, "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()")),
    }


#: transactions that this process began
_begun = [0]


def counted(db: Database) -> Database:
    """Whose transactions are counted."""

    def begun(_: object) -> None:
        _begun[0] += 1

    event.listen(db._engine, "begin", begun)
    return db


def is_ray(process: psutil.Process) -> bool:
    try:
        return process.name() in ("gcs_server", "raylet")
    except psutil.Error:
        return False


def first_claims(db: Database) -> Iterator[Row]:
    """From when a job is prepared to its first claim, by the database's clock."""
    waits = []
    for _ in range(ROUNDS):
        job_id = sleeping_job(db, 1, 0.05)
        wait_for("a small job", lambda job_id=job_id: ended(db, job_id))
        at = {one.what: one.at for one in events.events(db, job_id)}
        waits.append(at[What.STARTED] - at[What.PLANNED])
    yield summarise("warm fleet: from prepared to the first claim", waits, "s", at_most=1.0)


def tail(db: Database) -> Row:
    """Of a job of few and long shards: 1.5 a worker, of eight batches."""
    job_id = sleeping_job(db, ACTORS * 12, 0.5, shard_batches=8)
    total = ACTORS * 12
    at: dict[str, float] = {}

    def look() -> bool:
        done = record.batches(db, job_id)[0]
        for name, share in (("first", 0), ("most", 0.95), ("all", 1)):
            if done > share * total - (share == 1):
                at.setdefault(name, time.monotonic())
        return "all" in at

    began = time.monotonic()
    wait_for("the tail", look)
    share = (at["all"] - at["most"]) / (at["all"] - began)
    return one("the last 5 % of the batches: share of the time", share, "", at_most=0.33)


def took(db: Database, shards: int, half_way: Callable[[], object] = lambda: None) -> float:
    """Seconds for a job of two-second shards, something being done in its middle."""
    job_id = sleeping_job(db, shards, SHARD_SECONDS)
    began = time.monotonic()
    wait_for("the middle", lambda: done_shards(db, job_id) >= shards // 2)
    half_way()
    wait_for("the end", lambda: ended(db, job_id))
    assert (
        asked(db, f"SELECT count(*) FROM outcome o JOIN run r ON r.id = o.run_id WHERE r.job_id = {job_id}") == shards
    )
    return time.monotonic() - began


# --- losses and memory -----------------------------------------------------------------------------------------------


def lost_workers(db: Database) -> Row:
    """From SIGKILL of a worker until somebody has its shard again; nobody was idle."""
    waits = []
    with running(SleepingFleet(db, workers=1)) as fleet:
        for _ in range(ROUNDS):
            job_id = sleeping_job(db, 1, 3600, step=0.1)
            held = f"SELECT coalesce(max(epoch), 0) FROM task WHERE state = 'leased' AND job_id = {job_id}"
            wait_for("the shard in hand", lambda held=held: asked(db, held) == 1)
            [pulse] = [pulse for pulse in fleet.pulses() if pulse.job_id == job_id]
            began = time.monotonic()
            os.kill(pulse.pid, signal.SIGKILL)
            wait_for("the shard in hand again", lambda held=held: asked(db, held) == 2)
            waits.append(time.monotonic() - began)
            record.cancel_job(db, job_id)
            small = sleeping_job(db, 1, 0.05)  # a shard that gets done: the pause after a death starts anew
            wait_for("a free worker", lambda small=small: ended(db, small))
            [member] = fleet._crew.members
            wait_for("forgiveness", lambda member=member: not fleet._crew.blame.deaths(member.need))
    return summarise("worker lost: until its shard runs again", waits, "s", at_most=60)


def memory(db: Database, shards: int = 10_000, settled: int = 2_000) -> Iterator[Row]:
    """Of the supervisor while shards are done that take no time."""
    job_id = sleeping_job(db, shards, 0.0)
    own, sizes = psutil.Process(), {}

    def look() -> None:
        done = done_shards(db, job_id)
        sizes.setdefault(done >= settled, own.memory_info().rss)

    with SleepingFleet(db, [job_id], workers=2) as fleet:
        fleet.run(look)
    grown = (own.memory_info().rss - sizes[True]) / 1e6
    yield one(f"supervisor: memory grown from shard {settled} to {shards}", grown, "MB", at_most=8)


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Print the table and write it to build/bench/cluster.json. Names of parts as arguments: only these."""
    wanted = sys.argv[1:] or ["real", "scale", "lost", "memory"]
    print(f"load before: {os.getloadavg()[0]:.2f}; {psutil.cpu_count()} processors")
    with postgresql.server() as server:
        write("cluster", printed(everything(server, wanted)))


def everything(server: str, wanted: list[str]) -> Iterator[Row]:
    """Every row of the table, in its order."""
    if "real" in wanted:
        with (
            tempfile.TemporaryDirectory(prefix="shortstop-bench-") as folder,
            closing(open_database(f"sqlite:///{Path(folder) / 'record.db'}")) as db,
        ):
            yield two_workers(db)
    parts: dict[str, Callable[[Database], Iterator[Row]]] = {
        "scale": in_a_cluster,
        "lost": lambda db: iter([lost_workers(db)]),
        "memory": memory,
    }
    for name, part in parts.items():
        if name in wanted:
            with postgresql.database(server) as url, closing(counted(open_database(url, patient=True))) as db:
                yield from part(db)


def in_a_cluster(db: Database) -> Iterator[Row]:
    with ray_nodes(ACTORS // NODES, NODES) as cluster:
        yield from scale(db, cluster)


if __name__ == "__main__":
    main()
