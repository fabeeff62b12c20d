"""`kill -9` of the server in the middle of submissions: nothing that was asked for is lost, nothing is there twice."""

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from served import Served, begin
from small_world import World, wait_for

from cluster.client import Client
from cluster.errors import ServerError
from db import events, jobs
from db.keys import create_key
from db.session import Database, open_database

CLIENTS, EACH, DEATHS = 6, 10, 2


@contextmanager
def ended(served: list[Served]) -> Iterator[None]:
    try:
        yield
    finally:
        served[-1].kill()


@pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])
def test_no_submission_is_lost_or_doubled(
    request: pytest.FixtureRequest, world: World, tmp_path: Path, dialect: str
) -> None:
    """Clients try again with the key of their submission; the record has one job for each, and one event."""
    url = request.getfixturevalue(f"{dialect}_url")
    with closing(open_database(url)) as db:
        _submit_across_deaths(db, world, tmp_path)


def _submit_across_deaths(db: Database, world: World, tmp_path: Path) -> None:
    url = db.url
    key, _ = create_key(db, "ci", ["submit"])
    arguments = ("--allow", str(world.folder))
    running = [begin(url, tmp_path / "uploads", *arguments)]
    port, spec, answered = running[0].port, world.spec(), {}

    def submit(client: int) -> None:
        with Client(running[0].url, key) as server:
            for name in (f"{client}-{turn}" for turn in range(EACH)):
                while name not in answered:
                    with suppress(ServerError):  # a server that is long in coming: a script begins again
                        answered[name] = server.submit(spec, key=name)

    with ended(running):
        threads = [threading.Thread(target=submit, args=(client,)) for client in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for death in range(1, DEATHS + 1):
            many = CLIENTS * EACH * death // (DEATHS + 1)
            wait_for("submissions", lambda many=many: len(answered) >= many)
            running[-1].kill()
            running.append(begin(url, tmp_path / "uploads", *arguments, port=port))
        for thread in threads:
            thread.join()
    rows = jobs.list_jobs(db)
    assert len(answered) == CLIENTS * EACH
    assert sorted(answered.values()) == sorted(row.id for row in rows)
    assert all([event.what for event in events.events(db, row.id)] == ["submitted"] for row in rows)
