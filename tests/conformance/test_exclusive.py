"""One fleet over all jobs at a time: who has the place, who waits for it, and that the dead have let go."""

import os
from collections.abc import Iterator
from contextlib import closing

import pytest
from faults import process
from sqlalchemy import text
from waiting import wait_for

from db.exclusive import Exclusive
from db.session import Database, open_database


@pytest.fixture
def first(db: Database) -> Iterator[Exclusive]:
    place = Exclusive(db, "host-a, process 7")
    assert place.take()
    yield place
    place.release()


def test_one_has_it_and_the_other_learns_who(first: Exclusive, url: str) -> None:
    with closing(open_database(url)) as other:
        second = Exclusive(other, "host-b, process 8")
        assert not second.take()
        assert second.holder() == "host-a, process 7"
        assert first.kept()
        first.release()
        assert second.take()
        assert second.holder() == "host-b, process 8"
        second.release()


def test_who_has_just_let_go_is_not_known(first: Exclusive) -> None:
    """Between a vain try and the question who it was. Red where a file that is gone is read."""
    first.release()
    assert first.holder() == "another process"


def hold_until_killed(url: str) -> None:
    """Runs in a process of its own."""
    assert Exclusive(open_database(url), "doomed").take()
    os.kill(os.getpid(), 9)


def test_whoever_dies_has_let_go(db: Database, url: str) -> None:
    with process(hold_until_killed, url) as child:
        child.join(60)
    assert child.exitcode == -9
    place = Exclusive(db, "next")
    wait_for("the place", place.take)
    place.release()


def test_a_connection_that_was_cut_is_made_again(postgresql_db: Database) -> None:
    place = Exclusive(postgresql_db, "host-a")
    assert place.take()
    _cut(postgresql_db)
    assert place.kept()
    _cut(postgresql_db)
    second = Exclusive(postgresql_db, "host-b")
    wait_for("the place", second.take)
    assert not place.kept(), "another one was quicker"
    second.release()
    place.release()


def _cut(db: Database) -> None:
    holding = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted"
    with db.read() as connection:
        assert connection.execute(text(holding)).scalars().all() == [True]
