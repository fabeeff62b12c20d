"""`shortstop db prune`: old jobs go with all that hangs on them, nothing else does, and it may be interrupted."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from made import claimed, planned_job, results_of, summarise, work
from sqlalchemy import ColumnElement, Table, func, select, text
from test_checks import HASHES

from db import jobs, pruning, queue, results
from db.checks import check
from db.clock import now
from db.errors import BadInput, LeaseLost
from db.pruning import Pruned, planned, prune
from db.session import Database, open_database
from db.tables import UNCHECKED_ON_POSTGRESQL, job, job_event, metadata, task

DAY = 86_400.0
POLICIES = ("full", "self-speculative exit_layer=18")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transactions so small that every table takes several."""
    monkeypatch.setattr(pruning, "_ROWS", 7)


def ended(db: Database, days_ago: float, **options: object) -> int:
    """A finished job that ended so long ago, with an event."""
    job_id = planned_job(db, 23, shard_batches=4, policies=POLICIES, **options)  # type: ignore[arg-type]
    lease = claimed(db, job_id=job_id)
    results.commit_shard(db, lease, results_of(db, lease, end_batch=1), split_at=1)
    work(db)
    results.finalise(db, job_id, summarise)
    age(db, job_id, days_ago)
    return job_id


def age(db: Database, job_id: int, days: float) -> None:
    with db.write() as connection:
        connection.execute(job.update().where(job.c.id == job_id).values(finished_at=job.c.finished_at - days * DAY))
        event_row = {"job_id": job_id, "at": 1.5, "who": "local", "what": "made old", "detail": {}}
        connection.execute(job_event.insert().values(event_row))


def counts(db: Database) -> dict[str, int]:
    with db.read() as connection:
        return {
            table.name: connection.execute(select(func.count()).select_from(table)).scalar_one()
            for table in metadata.sorted_tables
        }


def test_an_old_job_goes_with_all_that_hangs_on_it(db: Database, small: None) -> None:
    """Benchmarks and artifacts of nobody else go too; a job that ended later keeps every row."""
    kept = ended(db, 29, benchmarks=("lines",))
    with_kept = counts(db)
    before = list(results.completions(db, job_id=kept))
    gone = ended(db, 31, benchmarks=("lines", "more"))
    report = Pruned(jobs=[gone], outcomes=92, benchmarks=1, samples=23, artifacts=1)
    assert planned(db, 30 * DAY) == report
    seen: list[int] = []
    assert prune(db, 30 * DAY, on_job=seen.append) == report
    assert seen == [gone]
    # the made artifact is named by no job
    assert counts(db) == with_kept | {"artifact": 0, "idle_worker": counts(db)["idle_worker"]}
    assert [row.outcome.text for row in results.completions(db, job_id=kept)] == [row.outcome.text for row in before]
    assert list(check(db, HASHES)) == []
    with pytest.raises(BadInput, match="does not exist"):
        jobs.job(db, gone)
    assert prune(db, 30 * DAY) == Pruned([], 0, 0, 0, 0)


def test_nothing_is_left_of_the_last_job(db: Database, small: None) -> None:
    ended(db, 31)
    prune(db, 30 * DAY)
    kept = {table: n for table, n in counts(db).items() if n}
    assert kept == {"idle_worker": 1, "metric_list": 2}, "the names of metrics are few, and the next job's as well"


def test_an_unfinished_job_is_never_touched(db: Database) -> None:
    """However old it is, and whatever state it is in."""
    waits = jobs.create_job(db, name="waits", spec={"model": "none"})
    ready = planned_job(db, 23)
    running = planned_job(db, 23)
    results.commit_shard(db, lease := claimed(db, job_id=running), results_of(db, lease))
    for job_id in (waits, ready, running):
        with db.write() as connection:
            connection.execute(job.update().where(job.c.id == job_id).values(created_at=1.5, started_at=1.5))
            if job_id == running:  # as no job that was resumed has it, but a clock may jump
                connection.execute(job.update().where(job.c.id == job_id).values(finished_at=1.5))
    before = counts(db)
    assert prune(db, 0) == Pruned([], 0, 0, 0, 1)
    assert counts(db) == before | {"artifact": 0}


def test_artifacts_that_a_job_names_stay(db: Database) -> None:
    job_id = planned_job(db, 4)
    with db.write() as connection:
        pinned = jobs.job(db, job_id).pinned | {"exits_hash": "hash-of-exits"}  # type: ignore[operator]
        connection.execute(job.update().where(job.c.id == job_id).values(pinned=pinned))
    assert prune(db, 0).artifacts == 0
    assert jobs.artifact(db, "hash-of-exits") == b"\x00exits"


def test_a_dry_run_changes_nothing(db: Database) -> None:
    ended(db, 31)
    before = counts(db)
    assert planned(db, 30 * DAY).jobs == [1]
    assert counts(db) == before


class Killed(Exception):
    """The process ended here."""


@contextmanager
def killed_before(write: int) -> Iterator[None]:
    """Ends the process at its n-th write transaction."""
    numbers = itertools.count()
    begin = Database.write

    @contextmanager
    def counted(self: Database) -> Iterator[object]:
        if next(numbers) == write:
            raise Killed
        with begin(self) as connection:
            yield connection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Database, "write", counted)
        yield


def reasons(db: Database) -> list[str | None]:
    """The error of every job."""
    with db.read() as connection:
        return list(connection.execute(select(job.c.error)).scalars())


def test_a_prune_that_was_interrupted_anywhere_is_finished_by_the_next(
    db: Database, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every fifth of its transactions: what is half removed cannot be used, is named by `db check`, and goes.

    The next prune asks for older jobs only, and finishes the removal all the same.
    """
    interrupted = 0
    for write in itertools.count(1, 5):
        ended(db, 31)
        with killed_before(write):
            try:
                prune(db, 30 * DAY)
                break
            except Killed:
                interrupted += 1
        half = [sentence for sentence in check(db, HASHES) if "; run `shortstop db prune` again" not in sentence]
        assert half == []
        begun = reasons(db) != [None]
        assert begun or len(jobs.list_jobs(db)) == 1
        prune(db, 1000 * DAY)
        assert not begun or reasons(db) == []
        prune(db, 30 * DAY)
        assert list(check(db, HASHES)) == []
        assert sum(counts(db).values()) == counts(db)["idle_worker"] + counts(db)["metric_list"]
    assert interrupted > 5


def test_a_job_that_is_resumed_meanwhile_stays(db: Database) -> None:
    """Red without the look at the state in `_condemn`, under the job's lock."""
    first, second = ended(db, 31), ended(db, 31)

    def revive(job_id: int) -> None:
        assert job_id == first
        with db.write() as connection:
            connection.execute(job.update().where(job.c.id == second).values(state="running", finished_at=None))

    assert prune(db, 30 * DAY, on_job=revive).jobs == [first]
    assert len(list(results.completions(db, job_id=second))) == 46


def test_a_benchmark_that_is_half_removed_is_not_used_again(db: Database, small: None) -> None:
    """A job that asks for the same content gets it whole: red where the hash stays until the samples are gone."""
    ended(db, 31)
    removed = pruning._remove

    def interrupted(db: Database, table, which) -> int:
        if table.name == "benchmark":
            raise Killed
        return removed(db, table, which)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "_remove", interrupted)
        with pytest.raises(Killed):
            prune(db, 30 * DAY)
    job_id = planned_job(db, 23)
    work(db)
    assert len(list(results.completions(db, job_id=job_id))) == 46
    assert len(list(check(db, HASHES))) == 1
    prune(db, 30 * DAY)
    assert list(check(db, HASHES)) == []


def test_a_shard_held_in_a_job_that_has_ended_is_taken_before_its_job_goes(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim at the moment of a cancel may leave one; committed during a prune, it would leave outcomes of nobody.

    Red without `close_tasks` in `_condemn`.
    """
    gone = planned_job(db, 4, shard_batches=4)
    lease = claimed(db, job_id=gone)
    late = results_of(db, lease)
    jobs.cancel_job(db, gone)
    held = {"state": "leased", "epoch": lease.epoch, "lease_until": now() + 30}
    with db.write() as connection:
        connection.execute(task.update().where(task.c.id == lease.task_id).values(held))
    remove, refused = pruning._remove, []

    def commit_first(db: Database, table: Table, which: ColumnElement[bool]) -> int:
        if not refused and table is pruning.OF_RUN[0]:
            with pytest.raises(LeaseLost):
                results.commit_shard(db, lease, late)
            refused.append(True)
        return remove(db, table, which)

    monkeypatch.setattr(pruning, "_remove", commit_first)
    assert prune(db, 0).jobs == [gone]
    assert refused
    assert set(counts(db).values()) == {0}


def test_events_whose_job_is_gone_already_are_removed(db: Database) -> None:
    """The prune was interrupted between a job and its events; the next one finds nothing else to do."""
    ended(db, 31)
    removed = pruning._remove

    def interrupted(db: Database, table, which) -> int:
        if table.name == "job_event":
            raise Killed
        return removed(db, table, which)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "_remove", interrupted)
        patch.setattr(pruning, "_remove_lost_events", lambda db: None)
        with pytest.raises(Killed):
            prune(db, 30 * DAY)
    with db.write() as connection:
        for table in ("sample", "benchmark_name", "benchmark", "artifact"):
            connection.execute(text(f"DELETE FROM {table}"))
    [sentence] = check(db, HASHES)
    assert "rows are of jobs that are gone; run `shortstop db prune` again" in sentence
    assert prune(db, 30 * DAY) == Pruned([], 0, 0, 0, 0)
    assert list(check(db, HASHES)) == []


def test_every_table_that_hangs_on_a_job_is_known() -> None:
    """A new table that refers to a job or a run must be told to `db.pruning`."""
    known = {table.name for table in (*pruning.OF_RUN, *pruning.OF_JOB)} | {"job"}
    hanging = {"job"}
    while True:
        more = {
            table.name
            for table in metadata.sorted_tables
            if any(key.column.table.name in hanging for key in table.foreign_keys)
        }
        if more <= hanging:
            break
        hanging |= more
    assert hanging == known
    named = {table.name for table in metadata.sorted_tables if {"job_id", "run_id"} & set(table.c.keys())}
    assert named <= known | {"job_event", "firing_job"}  # the history of a schedule outlives its jobs


def test_every_foreign_key_without_an_index_is_known(postgresql_db: Database) -> None:
    """One that is missing in `_UNSERVED` would cost a scan for every row that goes."""
    unserved = set()
    for table in metadata.sorted_tables:
        starts = {next(iter(table.primary_key)).name} | {next(iter(index.columns)).name for index in table.indexes}
        starts |= {
            next(iter(constraint.columns)).name
            for constraint in table.constraints
            if type(constraint).__name__ == "UniqueConstraint"
        }
        unserved |= {(table.name, key.parent.name) for key in table.foreign_keys if key.parent.name not in starts}
    unserved -= UNCHECKED_ON_POSTGRESQL
    few = {(table, "benchmark_id") for table in ("benchmark_name", "run", "task")}  # looked up once a benchmark
    few.add(("browser_session", "key_id"))  # keys stay
    few |= {("incident", "opened_by"), ("incident", "closed_by")}  # they go with their schedule
    assert unserved - few == {(table.name, column) for table, column in pruning._UNSERVED}
    assert prune(postgresql_db, 0) == Pruned([], 0, 0, 0, 0)


def test_indices_of_a_prune_go_with_it(postgresql_db: Database, postgresql_url: str) -> None:
    """Also when it was killed with them in place; and two prunes at once are refused."""
    ended(postgresql_db, 31)
    names = "SELECT count(*) FROM pg_indexes WHERE indexname LIKE 'prune_%'"
    with pruning._unserved(postgresql_db), postgresql_db.read() as connection:
        assert connection.execute(text(names)).scalar_one() == len(pruning._UNSERVED)
        other = open_database(postgresql_url)
        with pytest.raises(BadInput, match="is being pruned by somebody else; wait"):
            prune(other, 30 * DAY)
        other.close()
    with postgresql_db.write() as connection:
        connection.execute(text("CREATE INDEX prune_rollup_task_id ON rollup (task_id)"))
    prune(postgresql_db, 30 * DAY)
    with postgresql_db.read() as connection:
        assert connection.execute(text(names)).scalar_one() == 0


def test_foreign_keys_are_served_while_it_runs(db: Database) -> None:
    """No statement of a prune scans the outcomes of other jobs: on SQLite none is checked, on PostgreSQL by index."""
    with pruning._unserved(db) as quick:
        if db.dialect == "sqlite":
            with quick.read() as connection:
                assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 0
            with db.read() as connection:
                assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1
        else:
            assert quick is db


def test_a_worker_of_a_pruned_job_writes_nothing_into_a_new_one(db: Database) -> None:
    """Protects the new job where SQLite gives its rows the numbers of the old one's."""
    gone = planned_job(db, 4, shard_batches=4)
    frozen = claimed(db, "frozen", job_id=gone)
    late = results_of(db, frozen)
    jobs.cancel_job(db, gone)
    prune(db, 0)
    new = planned_job(db, 4, shard_batches=4)
    lease = claimed(db, "awake", job_id=new)
    if db.dialect == "sqlite":
        assert (lease.task_id, lease.epoch) == (frozen.task_id, frozen.epoch)
    for act in (
        lambda: queue.renew(db, frozen, 0),
        lambda: results.commit_shard(db, frozen, late),
    ):
        with pytest.raises(LeaseLost):
            act()
    assert not queue.give_back(db, frozen)
    assert not queue.fail(db, frozen, "late")
    results.commit_shard(db, lease, results_of(db, lease))
    with pytest.raises(LeaseLost):
        results.commit_shard(db, frozen, late)
