"""Telling people: messages signed as Standard Webhooks are (https://www.standardwebhooks.com), and where they may go.

A name is looked up once, every address that it has must be a public one or allowed by the setting `webhook_allow`, and
the connection goes to an address that was looked at: no second answer of the name server counts. Redirects and proxies
are not followed. Whoever adds a schedule thus reaches no machine that only the server can reach.
"""

import hashlib
import hmac
import socket
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TypeAlias
from urllib.parse import urlsplit

import httpx
import structlog

from cluster.schedules.spec import host_of
from db import incidents
from db.incidents import Attempt, MessageState
from db.schedules import Clock
from db.session import Database
from engine.errors import BadInput

log = structlog.get_logger()

Address: TypeAlias = IPv4Address | IPv6Address
Lookup: TypeAlias = Callable[[str, int], Sequence[str]]

#: for a connection, and between two bytes of an answer
SECONDS = 10.0
#: messages of one look: the rest waits for the next
_AT_ONCE = 20
_NAT64 = IPv6Network("64:ff9b::/96")


class Refused(Exception):
    """The message was not taken; the message of this is what the record keeps."""


class Receivers:
    """Where messages may go: every public address, and what the setting names besides."""

    def __init__(self, allow: Sequence[str] = (), lookup: Lookup | None = None) -> None:
        """allow: addresses, networks such as 10.0.0.0/8, and names of hosts. Raises `BadInput`."""
        self._names = {entry.lower() for entry in allow if not _is_network(entry)}
        self._networks = [ip_network(entry, strict=False) for entry in allow if _is_network(entry)]
        self._lookup = lookup or _looked_up

    def check(self, url: str) -> None:
        """Refuse what can be seen to lead nowhere without asking a name server. Raises `BadInput`."""
        host, is_address = host_of(url)
        if is_address or host.lower() == "localhost":
            address = ip_address(host) if is_address else ip_address("127.0.0.1")
            if host.lower() not in self._names and not self._is_allowed(address):
                raise BadInput(
                    f"webhook {url!r}: {address} is a private address; give a public one, or have it added to the "
                    "setting webhook_allow."
                )

    def address_of(self, url: str) -> str:
        """The address to connect to. Raises `Refused`."""
        parts = urlsplit(url)
        host = parts.hostname or ""
        try:
            found = self._lookup(host, parts.port or (443 if parts.scheme == "https" else 80))
        except OSError as error:
            raise Refused(f"{host} has no address ({error.strerror or error})") from None
        if not found:
            raise Refused(f"{host} has no address")
        if host.lower() not in self._names:
            for address in found:
                if not self._is_allowed(ip_address(address)):
                    raise Refused(f"{host} is {address}, a private address; the setting webhook_allow may allow it")
        return found[0]

    def _is_allowed(self, address: Address) -> bool:
        for one in _meant(address):
            named = any(one.version == network.version and one in network for network in self._networks)
            if not named and (not one.is_global or one.is_multicast or one.is_reserved):
                return False
        return True


def _meant(address: Address) -> list[Address]:
    """The address, or the IPv4 addresses that it carries: they are where packets end up."""
    if isinstance(address, IPv4Address):
        return [address]
    carried: list[Address] = [one for one in (address.ipv4_mapped, address.sixtofour) if one is not None]
    if address.teredo is not None:
        carried += address.teredo
    if address in _NAT64:
        carried.append(IPv4Address(int(address) & 0xFFFFFFFF))
    return carried or [address]


def _is_network(entry: str) -> bool:
    try:
        ip_network(entry, strict=False)
    except ValueError:
        return False
    return True


def _looked_up(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(one[4][0]).partition("%")[0] for one in found))


def signature(secret: str, event_id: str, timestamp: int, body: str) -> str:
    """HMAC-SHA256 over id, time and body, as the header `webhook-signature` has it."""
    key = b64decode(secret.removeprefix("whsec_"))
    signed = f"{event_id}.{timestamp}.{body}".encode()
    return "v1," + b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def send_due(db: Database, clock: Clock, receivers: Receivers, goes_on: Callable[[], bool] = lambda: True) -> int:
    """Send the messages that are due, while it goes on. Returns how many were delivered."""
    done = 0
    for _ in range(_AT_ONCE):
        if not goes_on():
            break
        attempt = incidents.claim_message(db, clock())
        if attempt is None:
            break
        try:
            answer = _send(attempt, receivers, int(clock()))
        except Refused as error:
            state = incidents.refused(db, attempt, str(error), clock())
            say = log.error if state is MessageState.DEAD else log.warning
            say(
                "webhook not delivered", url=attempt.url, attempt=attempt.attempts, reason=str(error), state=state.value
            )
        else:
            incidents.delivered(db, attempt, answer, clock())
            done += 1
    return done


def _send(attempt: Attempt, receivers: Receivers, timestamp: int) -> str:
    """Returns what the receiver answered. Raises `Refused`."""
    address = receivers.address_of(attempt.url)
    parts = urlsplit(attempt.url)
    host = parts.hostname or ""
    pinned = httpx.URL(attempt.url).copy_with(host=address)
    headers = {
        "Host": parts.netloc,
        "Content-Type": "application/json",
        "User-Agent": "shortstop",
        "webhook-id": attempt.event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signature(attempt.secret, attempt.event_id, timestamp, attempt.body),
    }
    deadline = time.monotonic() + 2 * SECONDS
    try:
        with (
            httpx.Client(timeout=SECONDS, follow_redirects=False, trust_env=False) as http,
            # the certificate is the name's, not the address's
            http.stream(
                "POST", pinned, content=attempt.body.encode(), headers=headers, extensions={"sni_hostname": host}
            ) as answer,
        ):
            if time.monotonic() > deadline:
                raise Refused(f"no answer within {2 * SECONDS:.0f} s")
            if answer.is_redirect:
                raise Refused(f"{answer.status_code}: redirects are not followed")
            if not answer.is_success:
                raise Refused(f"{answer.status_code} {answer.reason_phrase}".strip())
            return str(answer.status_code)
    except httpx.TimeoutException:
        raise Refused(f"no answer within {SECONDS:.0f} s") from None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise Refused(f"{type(error).__name__}: {str(error) or 'the line broke'}") from None
