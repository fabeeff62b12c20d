"""Incidents and who is told of them: one message when a schedule begins to fail, one when it passes again.

A message is written in the transaction that gave the verdict, and sent by whoever looks next (`claim_message`). Those
of one webhook go in order: while one is refused, the next waits. Sent is at least once; the event's id is the same.
"""

import json
import random
import secrets
from base64 import b64encode
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, exists, insert, select, update

from db.schedule_tables import firing, firing_job, incident, message, schedule, webhook
from db.session import Database
from db.tables import insert_new

#: an attempt that was not answered by then may be made again by somebody else
ATTEMPT_SECONDS = 60.0
#: after the first failed attempt, twice as much after the next, and so on up to the longest
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 10.0, 3600.0
#: a message that was refused for so long is dead, until somebody has it sent again
GIVE_UP_SECONDS = 3 * 86_400.0


class MessageState(StrEnum):
    """Where a message stands."""

    WAITING = "waiting"  #: to be sent, at once or after a pause
    DELIVERED = "delivered"  #: the receiver has it
    DEAD = "dead"  #: refused for three days


@dataclass(frozen=True)
class IncidentRow:
    """From the first failure of a schedule to its next pass. Times are seconds since 1970."""

    id: int
    schedule_id: int
    opened_at: float
    firings: int  #: that failed in it
    closed_at: float | None


@dataclass(frozen=True)
class MessageRow:
    """What a webhook is told. Times are seconds since 1970."""

    id: int
    url: str
    event_id: str
    body: str
    state: MessageState
    made_at: float
    next_at: float | None  #: when it is sent next; None: it is over
    attempts: int
    answer: str | None  #: of the last attempt: the status, or why there was none
    ended_at: float | None


@dataclass(frozen=True)
class Attempt:
    """A message that is ours to send now."""

    id: int
    url: str
    secret: str
    event_id: str
    body: str
    made_at: float
    attempts: int  #: this one included


def new_secret() -> str:
    """For a webhook, as Standard Webhooks writes it."""
    return "whsec_" + b64encode(secrets.token_bytes(24)).decode()


def note_verdict(connection: Connection, schedule_id: int, firing_id: int, at: float) -> None:
    """Open an incident, count on, or close it, as the verdict of the firing says; in the caller's transaction.

    What is inconclusive, and what has no verdict, changes nothing.
    """
    verdict = connection.execute(select(firing.c.verdict).where(firing.c.id == firing_id)).scalar_one()
    still = (incident.c.schedule_id == schedule_id, incident.c.closed_at.is_(None))
    if verdict == "fail":
        opened = {"schedule_id": schedule_id, "opened_at": at, "opened_by": firing_id, "firings": 1}
        if insert_new(connection, incident, opened):
            _tell(connection, schedule_id, firing_id, "incident.opened", at)
        else:
            connection.execute(update(incident).where(*still).values(firings=incident.c.firings + 1))
    elif verdict == "pass":
        closed = update(incident).where(*still).values(closed_at=at, closed_by=firing_id)
        if connection.execute(closed).rowcount:
            _tell(connection, schedule_id, firing_id, "incident.closed", at)


def _tell(connection: Connection, schedule_id: int, firing_id: int, kind: str, at: float) -> None:
    body = json.dumps(_body(connection, schedule_id, firing_id, kind, at), ensure_ascii=False)
    for webhook_id in connection.execute(select(webhook.c.id).where(webhook.c.schedule_id == schedule_id)).scalars():
        new = {"webhook_id": webhook_id, "event_id": f"msg_{secrets.token_hex(16)}", "body": body}
        new |= {"state": MessageState.WAITING, "made_at": at, "next_at": at, "attempts": 0}
        connection.execute(insert(message).values(new))


def _body(connection: Connection, schedule_id: int, firing_id: int, kind: str, at: float) -> dict[str, Any]:
    """What docs/schedules.md says of a message."""
    name = connection.execute(select(schedule.c.name).where(schedule.c.id == schedule_id)).scalar_one()
    of_firing = select(firing.c.fire_at, firing.c.verdict, firing.c.sentence, firing.c.resolved, firing.c.changed)
    fired = connection.execute(of_firing.where(firing.c.id == firing_id)).one()
    of_jobs = select(firing_job.c.role, firing_job.c.job_id).where(firing_job.c.firing_id == firing_id)
    of_incident = select(incident.c.id, incident.c.opened_at, incident.c.firings).where(
        incident.c.schedule_id == schedule_id
    )
    its = connection.execute(of_incident.order_by(incident.c.id.desc()).limit(1)).one()
    return {
        "type": kind,
        "timestamp": _moment(at),
        "data": {
            "schedule": name,
            "incident": its.id,
            "opened_at": _moment(its.opened_at),
            "failed_firings": its.firings,
            "fire_at": _moment(fired.fire_at),
            "verdict": fired.verdict,
            "sentence": fired.sentence,
            "jobs": {row.role: row.job_id for row in connection.execute(of_jobs)},
            "latest": fired.resolved,
            "changed": fired.changed,
        },
    }


def _moment(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


# --- sending -------------------------------------------------------------------------------------------------


def claim_message(db: Database, at: float) -> Attempt | None:
    """The next message that is due, for this caller to send; None where there is none, or others send them."""
    older = message.alias()
    first = ~exists().where(
        older.c.webhook_id == message.c.webhook_id, older.c.state == MessageState.WAITING, older.c.id < message.c.id
    )
    due = (message.c.state == MessageState.WAITING, message.c.next_at <= at)
    names = [message.c.id, webhook.c.url, webhook.c.secret, message.c.event_id, message.c.body]
    chosen = select(*names, message.c.made_at, message.c.attempts).join(webhook).where(*due, first)
    with db.read() as connection:
        row = connection.execute(chosen.order_by(message.c.next_at, message.c.id).limit(1)).one_or_none()
    if row is None:
        return None
    mine = update(message).where(message.c.id == row.id, message.c.attempts == row.attempts, *due)
    claimed = mine.values(attempts=row.attempts + 1, next_at=at + ATTEMPT_SECONDS)
    with db.write() as connection:
        if connection.execute(claimed).rowcount == 0:
            return None  # somebody else has taken it
    values = dict(zip(Attempt.__dataclass_fields__, row, strict=True))
    return Attempt(**values | {"attempts": row.attempts + 1})


def delivered(db: Database, attempt: Attempt, answer: str, at: float) -> None:
    """The receiver has it, whoever sends it beside us by now."""
    values = {"state": MessageState.DELIVERED, "answer": answer, "next_at": None, "ended_at": at}
    with db.write() as connection:
        connection.execute(update(message).where(message.c.id == attempt.id).values(values))


def refused(db: Database, attempt: Attempt, answer: str, at: float) -> MessageState:
    """The receiver does not have it: it is sent again after a pause, or is dead."""
    if at - attempt.made_at >= GIVE_UP_SECONDS:
        values = {"state": MessageState.DEAD, "answer": answer, "next_at": None, "ended_at": at}
    else:
        values = {"state": MessageState.WAITING, "answer": answer, "next_at": at + pause(attempt.attempts)}
    mine = (message.c.id == attempt.id, message.c.attempts == attempt.attempts, message.c.state == MessageState.WAITING)
    with db.write() as connection:
        connection.execute(update(message).where(*mine).values(values))
    return MessageState(str(values["state"]))


def pause(attempts: int) -> float:
    """Seconds until the next attempt; never in step with others."""
    longest = min(FIRST_PAUSE_SECONDS * 2.0 ** min(attempts - 1, 20), LONGEST_PAUSE_SECONDS)
    return longest * random.uniform(0.8, 1.0)


def send_again(db: Database, schedule_id: int, at: float) -> int:
    """Dead messages of a schedule wait again, for another three days, and those that wait are due. Returns how many."""
    its = select(webhook.c.id).where(webhook.c.schedule_id == schedule_id)
    values = {"state": MessageState.WAITING, "made_at": at, "next_at": at, "ended_at": None}
    over = message.c.state != MessageState.DELIVERED
    with db.write() as connection:
        return connection.execute(update(message).where(message.c.webhook_id.in_(its), over).values(values)).rowcount


# --- what there is -------------------------------------------------------------------------------------------

_INCIDENT = [incident.c[name] for name in IncidentRow.__dataclass_fields__]


def open_incidents(db: Database) -> dict[int, IncidentRow]:
    """By schedule."""
    with db.read() as connection:
        rows = connection.execute(select(*_INCIDENT).where(incident.c.closed_at.is_(None)))
        return {row.schedule_id: IncidentRow(*row) for row in rows}


def incidents(db: Database, schedule_id: int, limit: int = 20) -> list[IncidentRow]:
    """Newest first."""
    chosen = select(*_INCIDENT).where(incident.c.schedule_id == schedule_id).order_by(incident.c.id.desc())
    with db.read() as connection:
        return [IncidentRow(*row) for row in connection.execute(chosen.limit(limit))]


def messages(
    db: Database, schedule_id: int, *, states: Collection[MessageState] = tuple(MessageState), limit: int = 50
) -> list[MessageRow]:
    """What the schedule's webhooks were told or are still to be told, newest first."""
    names = [webhook.c.url if name == "url" else message.c[name] for name in MessageRow.__dataclass_fields__]
    chosen = select(*names).join(webhook).where(webhook.c.schedule_id == schedule_id, message.c.state.in_(states))
    with db.read() as connection:
        rows = connection.execute(chosen.order_by(message.c.id.desc()).limit(limit)).all()
    found = [dict(zip(MessageRow.__dataclass_fields__, row, strict=True)) for row in rows]
    return [MessageRow(**values | {"state": MessageState(values["state"])}) for values in found]
