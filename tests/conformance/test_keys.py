"""API keys in the record: what lets in, and what does no more."""

import time

import pytest
from sqlalchemy import text

from db import keys
from db.errors import BadInput, Missing
from db.keys import Scope
from db.session import Database


def test_a_key_lets_its_owner_in_and_no_other(db: Database) -> None:
    key, row = keys.create_key(db, "ci", ["read", "submit"])
    found = keys.find_key(db, key)
    assert found is not None
    assert (found.id, found.name, found.scopes) == (row.id, "ci", (Scope.READ, Scope.SUBMIT))
    other, _ = keys.create_key(db, "ci", ["admin"])
    mixed = other.rsplit("_", 1)[0] + key[-44:]
    for wrong in ("", "x", key[:-1], key + "A", key.upper(), mixed, f"Bearer {key}", key.replace(row.id, "0" * 12)):
        assert keys.find_key(db, wrong) is None, wrong


def test_the_record_does_not_hold_the_key(db: Database) -> None:
    """Whoever reads the database, or a backup of it, gets in nowhere."""
    key, row = keys.create_key(db, "ci", ["read"])
    token = keys.open_session(db, row)
    with db.read() as connection:
        kept = [
            *connection.execute(text("SELECT * FROM api_key")),
            *connection.execute(text("SELECT * FROM browser_session")),
        ]
    assert key.rsplit("_", 1)[1][:20] not in str(kept)
    assert token not in str(kept)
    assert key not in repr(keys.list_keys(db))


def test_a_revoked_key_is_out_at_once_with_its_browsers(db: Database) -> None:
    key, row = keys.create_key(db, "ci", ["read"])
    token = keys.open_session(db, row)
    assert keys.find_session(db, token) is not None
    revoked = keys.revoke_key(db, row.id)
    assert revoked.revoked_at is not None
    assert keys.find_key(db, key) is keys.find_session(db, token) is None
    assert keys.revoke_key(db, row.id) == revoked  # and the moment stays
    with pytest.raises(Missing, match="does not exist"):
        keys.revoke_key(db, "nobody")


def test_a_key_ends_by_the_databases_clock(db: Database) -> None:
    short, _ = keys.create_key(db, "ci", ["read"], lifetime_s=0.2)
    long, _ = keys.create_key(db, "ci", ["read"], lifetime_s=60)
    time.sleep(0.3)
    assert keys.find_key(db, short) is None
    assert keys.find_key(db, long) is not None
    assert keys.any_key(db, valid=True)


def test_whether_there_is_any_key(db: Database) -> None:
    """A server that had a key once never opens up because it was revoked."""
    assert not keys.any_key(db)
    _, row = keys.create_key(db, "ci", ["read"])
    assert keys.any_key(db)
    assert keys.any_key(db, valid=True)
    keys.revoke_key(db, row.id)
    assert keys.any_key(db)
    assert not keys.any_key(db, valid=True)


def test_the_last_use_is_noted_and_not_at_every_call(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    key, row = keys.create_key(db, "ci", ["read"])
    assert row.last_used_at is None
    keys.find_key(db, key)
    [first] = keys.list_keys(db)
    assert first.last_used_at is not None
    keys.find_key(db, key)
    assert keys.list_keys(db) == [first]


def test_a_browser_is_logged_in_until_it_is_not(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    _, row = keys.create_key(db, "her", ["read"])
    token = keys.open_session(db, row)
    found = keys.find_session(db, token)
    assert found is not None
    assert found.name == "her"
    assert keys.find_session(db, token + "x") is None
    keys.close_session(db, token)
    assert keys.find_session(db, token) is None
    monkeypatch.setattr(keys, "SESSION_SECONDS", -1.0)
    assert keys.find_session(db, keys.open_session(db, row)) is None


@pytest.mark.parametrize("name", ["", "local", "a b", "x" * 101, "a\n", "é ü", "<b>"])
def test_names_are_words(db: Database, name: str) -> None:
    with pytest.raises(BadInput, match="name"):
        keys.create_key(db, name, ["read"])
    assert keys.list_keys(db) == []


@pytest.mark.parametrize("scopes", [[], ["root"], ["read", "Admin"]])
def test_scopes_are_known(db: Database, scopes: list[str]) -> None:
    with pytest.raises(BadInput, match="read, submit, query, admin"):
        keys.create_key(db, "ci", scopes)
