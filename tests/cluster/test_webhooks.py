"""Webhooks: signed, sent until they are taken, in order, and to nobody whom only the server can reach."""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from receiver import Receiver, receiving

from cluster.schedules.spec import check_url
from cluster.schedules.webhooks import Receivers, send_due, signature
from db import firings, incidents, schedules
from db.incidents import MessageState
from db.schedules import ScheduleRow, Verdict, Wish
from db.session import Database
from engine.errors import BadInput

START, HOUR, DAY = 1.8e9, 3600.0, 86_400.0


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as started:
        yield started


@pytest.fixture
def here() -> Receivers:
    """This machine is allowed, as an operator would say it."""
    return Receivers(["127.0.0.0/8"])


SECRET = incidents.new_secret()


def schedule(db: Database, *urls: str) -> ScheduleRow:
    return schedules.add(
        db,
        "nightly",
        {},
        overlap="allow",
        next_at=None,
        principal="alice",
        at=START,
        webhooks=[(url, SECRET) for url in urls],
    )


def verdict(db: Database, row: ScheduleRow, at: float, verdict: Verdict) -> None:
    one = firings.trigger(db, row, Wish("x", {}), at)
    assert firings.settle(db, row, one, verdict, "ROUGE-L: a loss of 20 %.", at=at)


def test_what_a_receiver_gets(db: Database, receiver: Receiver, here: Receivers) -> None:
    row = schedule(db, receiver.url)
    verdict(db, row, START, Verdict.FAIL)
    assert send_due(db, lambda: START + 1, here) == 1
    assert send_due(db, lambda: START + DAY, here) == 0
    [got] = receiver.received
    assert got.path == "/hook"
    assert got.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert got.headers["content-type"] == "application/json"
    assert got.headers["webhook-timestamp"] == str(int(START + 1))
    assert got.is_signed_with(SECRET)
    assert not got.is_signed_with(incidents.new_secret())
    event = got.event
    assert (event["type"], event["timestamp"]) == ("incident.opened", "2027-01-15T08:00:00Z")
    told = event["data"]
    assert (told["schedule"], told["verdict"], told["failed_firings"]) == ("nightly", "fail", 1)
    assert told["sentence"] == "ROUGE-L: a loss of 20 %."
    assert list(told["jobs"]) == ["run"]


def test_the_signature_is_the_standards() -> None:
    """The example of the specification (standardwebhooks.com)."""
    secret, event_id = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek"
    body = '{"test": 2432232314}'
    assert signature(secret, event_id, 1614265330, body) == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_errors_for_a_day_lose_nothing(db: Database, receiver: Receiver, here: Receivers) -> None:
    """The pauses double up to an hour; then both messages arrive, in the order in which they happened, each once."""
    row = schedule(db, receiver.url)
    receiver.status = 503
    verdict(db, row, START, Verdict.FAIL)
    verdict(db, row, START + 2 * HOUR, Verdict.PASS)
    attempts, at = [], START
    while at < START + DAY:
        send_due(db, partial(float, at - 1), here)  # too early: nobody is asked
        assert len(receiver.received) == len(attempts)
        send_due(db, partial(float, at), here)
        attempts.append(at)
        [_, opened] = incidents.messages(db, row.id)
        assert opened.next_at is not None
        at = opened.next_at
    assert set(receiver.kinds) == {"incident.opened"}  # the second waits for the first
    assert len({one.headers["webhook-id"] for one in receiver.received}) == 1
    pauses = [later - earlier for earlier, later in pairwise(attempts)]
    assert 8 <= pauses[0] <= 10
    assert all(later >= 0.7 * earlier for earlier, later in pairwise(pauses))
    assert 0.8 * HOUR <= max(pauses) <= HOUR
    assert len(receiver.received) == len(attempts)
    assert 25 <= len(attempts) <= 45
    [closed, opened] = incidents.messages(db, row.id)
    assert (opened.state, opened.answer) == (MessageState.WAITING, "503 Service Unavailable")
    assert closed.attempts == 0

    receiver.status, before = 204, len(receiver.received)
    assert send_due(db, lambda: START + DAY + 2 * HOUR, here) == 2
    assert receiver.kinds[before:] == ["incident.opened", "incident.closed"]
    assert [one.state for one in incidents.messages(db, row.id)] == [MessageState.DELIVERED] * 2


def test_a_dead_letter_is_kept_and_sent_again_when_somebody_says_so(
    db: Database, receiver: Receiver, here: Receivers
) -> None:
    row = schedule(db, receiver.url)
    receiver.status = 500
    verdict(db, row, START, Verdict.FAIL)
    verdict(db, row, START, Verdict.PASS)
    late = START + incidents.GIVE_UP_SECONDS
    for _ in range(2):
        send_due(db, lambda: late, here)
    assert [one.state for one in incidents.messages(db, row.id)] == [MessageState.DEAD] * 2
    assert send_due(db, lambda: late + DAY, here) == 0
    receiver.status = 200
    assert incidents.send_again(db, row.id, late + DAY) == 2
    assert send_due(db, lambda: late + DAY, here) == 2
    assert receiver.kinds[-2:] == ["incident.opened", "incident.closed"]
    assert incidents.send_again(db, row.id, late + DAY) == 0


def test_a_receiver_that_is_away_does_not_keep_the_others_waiting(
    db: Database, receiver: Receiver, here: Receivers
) -> None:
    row = schedule(db, "http://127.0.0.1:9/", receiver.url)
    verdict(db, row, START, Verdict.FAIL)
    assert send_due(db, lambda: START, here) == 1
    assert receiver.kinds == ["incident.opened"]
    waiting = incidents.messages(db, row.id, states=[MessageState.WAITING])
    assert [one.url for one in waiting] == ["http://127.0.0.1:9/"]
    assert waiting[0].answer is not None
    assert waiting[0].answer.startswith("ConnectError")


def test_who_died_while_sending_is_followed_by_another(db: Database, receiver: Receiver, here: Receivers) -> None:
    """A message that was claimed and never answered for is sent again, under the same id."""
    row = schedule(db, receiver.url)
    verdict(db, row, START, Verdict.FAIL)
    claimed = incidents.claim_message(db, START)
    assert claimed is not None
    assert incidents.claim_message(db, START + 1) is None
    assert send_due(db, lambda: START + incidents.ATTEMPT_SECONDS, here) == 1
    [got] = receiver.received
    assert got.headers["webhook-id"] == claimed.event_id
    assert incidents.refused(db, claimed, "too late", START + 90) is MessageState.WAITING
    assert incidents.messages(db, row.id)[0].state is MessageState.DELIVERED


def test_redirects_are_not_followed(db: Database, receiver: Receiver, here: Receivers) -> None:
    row = schedule(db, receiver.url)
    receiver.status, receiver.headers = 307, {"Location": f"http://127.0.0.1:{receiver.port}/elsewhere"}
    verdict(db, row, START, Verdict.FAIL)
    assert send_due(db, lambda: START, here) == 0
    assert [one.path for one in receiver.received] == ["/hook"]
    assert incidents.messages(db, row.id)[0].answer == "307: redirects are not followed"


def test_proxies_of_the_environment_are_not_used(
    db: Database, receiver: Receiver, here: Receivers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy would look the name up again, by itself."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    verdict(db, schedule(db, receiver.url), START, Verdict.FAIL)
    assert send_due(db, lambda: START, here) == 1


PRIVATE = [
    "127.0.0.1",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "fe80::1",
    "fd00::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "2002:7f00:1::",
    "ff02::1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_refused(db: Database, receiver: Receiver, address: str) -> None:
    """By their own name when they are added, and behind a name when they are sent to."""
    shown = f"[{address}]" if ":" in address else address
    with pytest.raises(BadInput, match="is a private address; give a public one, or have it added to the setting"):
        Receivers().check(f"http://{shown}:{receiver.port}/hook")
    row = schedule(db, f"http://hooks.example.org:{receiver.port}/hook")
    verdict(db, row, START, Verdict.FAIL)
    assert send_due(db, lambda: START, Receivers(lookup=lambda host, port: ["93.184.216.34", address])) == 0
    assert receiver.received == []
    answer = incidents.messages(db, row.id)[0].answer
    assert answer == f"hooks.example.org is {address}, a private address; the setting webhook_allow may allow it"


def test_public_addresses_are_not_refused() -> None:
    for url in ("https://93.184.216.34/", "https://[2606:4700::1111]/", "https://hooks.example.org/"):
        Receivers().check(url)
    found = Receivers(lookup=lambda host, port: ["93.184.216.34", "2606:4700::1111"])
    assert found.address_of("https://hooks.example.org/") == "93.184.216.34"


def test_a_name_that_changes_its_address_gets_nowhere(db: Database, receiver: Receiver) -> None:
    """DNS rebinding: the address that was looked at is the one that is called; the name is asked once an attempt."""
    asked = []

    def lookup(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return ["127.0.0.2"] if len(asked) == 1 else ["10.0.0.1"]

    row = schedule(db, f"http://rebinding.example.org:{receiver.port}/hook")
    verdict(db, row, START, Verdict.FAIL)
    # 127.0.0.2 stands for a public address: the receiver listens on 127.0.0.1 only, so that nobody answers there
    send_due(db, lambda: START, Receivers(["127.0.0.2"], lookup))
    assert asked == [("rebinding.example.org", receiver.port)]
    assert receiver.received == []
    send_due(db, lambda: START + HOUR, Receivers(["127.0.0.2"], lookup))
    assert incidents.messages(db, row.id)[0].answer == (
        "rebinding.example.org is 10.0.0.1, a private address; the setting webhook_allow may allow it"
    )


def test_what_is_allowed_by_name_is_called_under_its_name(db: Database, receiver: Receiver) -> None:
    """An operator may name a host of the own network; certificates and hosts are the name's."""
    allowed = Receivers(["hooks.internal"], lookup=lambda host, port: ["127.0.0.1"])
    verdict(db, schedule(db, f"http://hooks.internal:{receiver.port}/x?y=1"), START, Verdict.FAIL)
    assert send_due(db, lambda: START, allowed) == 1
    [got] = receiver.received
    assert (got.headers["host"], got.path) == (f"hooks.internal:{receiver.port}", "/x?y=1")


def test_a_name_without_an_address(db: Database) -> None:
    def lookup(host: str, port: int) -> list[str]:
        raise OSError(-2, "Name or service not known")

    row = schedule(db, "https://gone.example.org/")
    verdict(db, row, START, Verdict.FAIL)
    send_due(db, lambda: START, Receivers(lookup=lookup))
    assert incidents.messages(db, row.id)[0].answer == "gone.example.org has no address (Name or service not known)"


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("ftp://x.org", "is no URL"),
        ("hooks.example.org", "is no URL"),
        ("http://", "is no URL"),
        ("http://x.org:99999/", "is no URL"),
        ("http://x.org/a b", "is no URL"),
        ("http://[::1", "is no URL"),
        ("https://me:secret@x.org/", "with a password or a # is not called"),
        ("https://x.org/#part", "with a password or a # is not called"),
    ],
)
def test_what_is_no_webhook(url: Any, complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        check_url(url)
