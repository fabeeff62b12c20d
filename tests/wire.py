"""A wire to a PostgreSQL server that can be cut at any byte."""

import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from select import select

from sqlalchemy import make_url


class Wire:
    """A way to a PostgreSQL server that breaks where it is told to: `url` is the record's, through here."""

    def __init__(self, url: str) -> None:
        to = make_url(url)
        self._server = f"{to.query['host']}/.s.PGSQL.{to.port or 5432}"
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = to.set(host="127.0.0.1", port=port, query={}).render_as_string(hide_password=False)
        self.cuts = 0  #: so far
        self._faults: Iterator[Fault] = iter(())
        self._fault: Fault | None = None
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        self._listener.close()

    def breaks(self, *faults: "Fault") -> None:
        """The next time that the client sends the words of the first fault; then of the next one."""
        self.keeps_breaking(iter(faults))

    def keeps_breaking(self, faults: Iterator["Fault"]) -> None:
        with self._lock:
            self._faults = faults
            self._fault = next(faults, None)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        """One connection, until an end hangs up or the wire breaks."""
        with client, socket.socket(socket.AF_UNIX) as server:
            try:
                server.connect(self._server)
                self._pass_on(client, server)
            except OSError:
                return  # an end is gone, and the other one learns it by the closing of these two

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        left: int | None = None  # bytes until the break, once its words were seen
        while True:
            readable, _, _ = select([client, server], [], [])
            if server in readable:
                client.sendall(_received(server))
            if client not in readable:
                continue
            data = _received(client)
            fault = self._take(data) if left is None else None
            if fault is not None and fault.answered:
                server.sendall(data)
                _drain(server)
                return
            if fault is not None:
                left = data.index(fault.words) + fault.after_bytes
            if left is not None and left <= len(data):
                server.sendall(data[:left])
                return
            server.sendall(data)
            left = None if left is None else left - len(data)

    def _take(self, data: bytes) -> "Fault | None":
        """The fault whose turn it is, where these bytes hold its words: it then happens to this connection alone."""
        with self._lock:
            fault = self._fault
            if fault is None or fault.words not in data:
                return None
            if fault.spared:
                self._fault = replace(fault, spared=fault.spared - 1)
                return None
            self._fault = next(self._faults, None)
            self.cuts += 1
            return fault


@dataclass(frozen=True)
class Fault:
    """The wire breaks once the client has sent these words."""

    words: bytes
    #: the server gets them and does what they say; its answer is lost. Otherwise the server gets none of what follows
    answered: bool = False
    after_bytes: int = 0  #: that the server still gets, counted from the first of the words
    spared: int = 0  #: how often the words pass before


def _received(end: socket.socket) -> bytes:
    """Raises `OSError` when the end has hung up."""
    data = end.recv(1 << 16)
    if not data:
        raise ConnectionError("hung up")
    return data


def _drain(server: socket.socket) -> None:
    """The server's answer up to the message that it is ready for the next question, outside any transaction."""
    answer = b""
    while not answer.endswith(b"Z\x00\x00\x00\x05I"):
        answer += _received(server)
