"""API keys: what lets a client in. The record holds hashes; a key is seen once, by whoever asked for it.

A key is `shortstop_<id>_<secret>`: found by its id, proved by its secret of 256 random bits, which no guess reaches, so
that one round of SHA-256 is enough to keep it. What a key may is looked up at every call: a revoked key is out at once.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import and_, bindparam, delete, insert, or_, select, update

from db.clock import now
from db.errors import BadInput, Missing
from db.events import LOCAL
from db.key_tables import api_key, browser_session
from db.session import Database

#: a key's last use is written when the one that stands there is older
USED_SECONDS = 60.0
SESSION_SECONDS = 12 * 3600.0

_FORM = re.compile(r"shortstop_([0-9a-f]{12})_([0-9A-Za-z_-]{43})")
_NAME = re.compile(r"[\w.@+-]{1,100}")
#: what an unknown id is compared with, so that it takes no less time than a wrong secret
_NOBODY = hashlib.sha256(b"nobody").hexdigest()


class Scope(StrEnum):
    """What a key may."""

    READ = "read"  #: look at jobs, reports, completions
    SUBMIT = "submit"  #: submit jobs, and change one's own
    QUERY = "query"  #: ask in SQL
    ADMIN = "admin"  #: all that, and change the jobs of others


@dataclass(frozen=True)
class KeyRow:
    """An API key without its secret. Times are seconds since 1970 by the database's clock."""

    id: str
    name: str  #: the principal of what is done with it
    scopes: tuple[Scope, ...]
    created_at: float
    expires_at: float | None
    last_used_at: float | None  #: to the minute
    revoked_at: float | None


_COLUMNS = [api_key.c[name] for name in KeyRow.__dataclass_fields__]
_LAST = api_key.c.last_used_at
_STALE = or_(_LAST.is_(None), now() - USED_SECONDS > _LAST)
_VALID = and_(api_key.c.revoked_at.is_(None), or_(api_key.c.expires_at.is_(None), api_key.c.expires_at > now()))
# made once: every request of the server asks one of them, and making it takes longer than the answer
_BY_ID = select(api_key.c.secret_hash, _STALE, *_COLUMNS).where(api_key.c.id == bindparam("id"), _VALID)
_BY_SESSION = (
    select(api_key.c.secret_hash, _STALE, *_COLUMNS)
    .join(browser_session)
    .where(browser_session.c.token_hash == bindparam("hash"), browser_session.c.expires_at > now(), _VALID)
)
_ANY = select(api_key.c.id).limit(1)


def create_key(
    db: Database, name: str, scopes: Sequence[str], *, lifetime_s: float | None = None
) -> tuple[str, KeyRow]:
    """Write a key. Returns the key itself, which nobody can read again, and its row. Raises `BadInput`.

    name: the principal; several keys may have it, so that one can follow the other.
    """
    if not _NAME.fullmatch(name) or name == LOCAL:
        raise BadInput(f"name {name!r}: give 1 to 100 letters, digits or . _ @ + -, and not {LOCAL!r}.")
    id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    values: dict[str, Any] = {"id": id, "name": name, "secret_hash": _hash(secret), "created_at": now()}
    values |= {"scopes": _known(scopes), "expires_at": None if lifetime_s is None else now() + lifetime_s}
    with db.write() as connection:
        row = connection.execute(insert(api_key).values(values).returning(*_COLUMNS)).one()
    return f"shortstop_{id}_{secret}", _row(row)


def _known(scopes: Sequence[str]) -> list[str]:
    wrong = [scope for scope in scopes if scope not in list(Scope)]
    if wrong or not scopes:
        raise BadInput(f"scope {wrong[0] if wrong else ''!r}: give one or more of {', '.join(Scope)}.")
    return [scope.value for scope in Scope if scope in scopes]


def list_keys(db: Database) -> list[KeyRow]:
    """Oldest first, revoked ones included."""
    with db.read() as connection:
        return [_row(row) for row in connection.execute(select(*_COLUMNS).order_by(api_key.c.created_at, api_key.c.id))]


def revoke_key(db: Database, id: str) -> KeyRow:
    """Let the key in no more, nor the browsers that are logged in with it. Raises `Missing`."""
    change = update(api_key).where(api_key.c.id == id, api_key.c.revoked_at.is_(None)).values(revoked_at=now())
    with db.write() as connection:
        connection.execute(change)
        connection.execute(delete(browser_session).where(browser_session.c.key_id == id))
        row = connection.execute(select(*_COLUMNS).where(api_key.c.id == id)).one_or_none()
    if row is None:
        raise Missing(f"key {id!r} does not exist; `shortstop key list` shows those that do.")
    return _row(row)


def any_key(db: Database, *, valid: bool = False) -> bool:
    """Whether there was ever a key; valid: whether there is one that lets somebody in."""
    with db.read() as connection:
        return connection.execute(_ANY.where(_VALID) if valid else _ANY).first() is not None


def find_key(db: Database, key: str) -> KeyRow | None:
    """The row of a key that lets its owner in: known, not revoked, not expired. Its use is noted."""
    form = _FORM.fullmatch(key)
    if form is None:
        return None
    id, secret = form.groups()
    with db.read() as connection:
        row = connection.execute(_BY_ID, {"id": id}).one_or_none()
    is_right = hmac.compare_digest(_hash(secret), _NOBODY if row is None else row[0])
    return _noted(db, tuple(row)) if row is not None and is_right else None


def find_session(db: Database, token: str) -> KeyRow | None:
    """The row of the key that the browser with this token is logged in with, while both are valid."""
    with db.read() as connection:
        row = connection.execute(_BY_SESSION, {"hash": _hash(token)}).one_or_none()
    return None if row is None else _noted(db, tuple(row))


def open_session(db: Database, key: KeyRow) -> str:
    """Log a browser in with a key. Returns the token that it keeps for `SESSION_SECONDS`."""
    token = secrets.token_urlsafe(32)
    new = {"token_hash": _hash(token), "key_id": key.id, "expires_at": now() + SESSION_SECONDS}
    with db.write() as connection:
        connection.execute(delete(browser_session).where(browser_session.c.expires_at <= now()))
        connection.execute(insert(browser_session).values(new))
    return token


def close_session(db: Database, token: str) -> None:
    """Log a browser out."""
    with db.write() as connection:
        connection.execute(delete(browser_session).where(browser_session.c.token_hash == _hash(token)))


def _noted(db: Database, row: Sequence[Any]) -> KeyRow:
    """row: (hash, whether the last use is to be written, the columns)."""
    found = _row(row[2:])
    if row[1]:
        with db.write() as connection:
            connection.execute(update(api_key).where(api_key.c.id == found.id, _STALE).values(last_used_at=now()))
    return found


def _row(row: Sequence[Any]) -> KeyRow:
    fields = dict(zip(KeyRow.__dataclass_fields__, row, strict=True))
    return KeyRow(**fields | {"scopes": tuple(map(Scope, fields["scopes"]))})


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
