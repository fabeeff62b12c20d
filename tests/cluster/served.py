"""A server as its users have it: `shortstop serve` in a process of its own."""

import os
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx
from small_world import World

from cluster import jobs
from db.keys import Scope, create_key
from db.session import Database, open_database

SECONDS = 60.0


@dataclass
class Served:
    """A running server."""

    url: str
    process: subprocess.Popen[str]
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=SECONDS, verify=False))

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def ask(self, method: str, path: str, key: str | None = None, **options: Any) -> httpx.Response:
        headers = options.pop("headers", {}) | ({"Authorization": f"Bearer {key}"} if key else {})
        answer = self.http.request(method, self.url + path, headers=headers, **options)
        self.http.cookies.clear()  # each request is somebody else's
        return answer

    def end(self, seconds: float = SECONDS) -> None:
        """Ask it to end, which it does within so many seconds."""
        self.http.close()
        self.process.terminate()
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """As `kill -9` does."""
        self.process.kill()
        self.process.wait()
        self.http.close()


def begin(
    database_url: str, uploads: Path, *arguments: str, port: int = 0, fleet: bool = False, **settings: str
) -> Served:
    """Start a server and wait until it accepts connections."""
    command = [str(Path(sys.executable).parent / "shortstop"), "serve", "--port", str(port)]
    command += [] if fleet else ["--no-fleet"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHORTSTOP_SERVER")}
    environment |= {"SHORTSTOP_UPLOADS": str(uploads), "SHORTSTOP_REQUESTS_PER_SECOND": "100000"}
    environment |= {f"SHORTSTOP_{name.upper()}": value for name, value in settings.items()}
    process = subprocess.Popen(
        [*command, "--database", database_url, *arguments], text=True, stderr=subprocess.PIPE, env=environment
    )
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.match(r"serving on (http://\S+),", line):
            # a pipe that nobody reads holds 64 kB, and then the server waits
            threading.Thread(target=_read_on, args=(process.stderr,), daemon=True).start()
            return Served(found[1], process)
    raise AssertionError(f"the server ended with {process.wait()}")


def _read_on(lines: IO[str]) -> None:
    with lines:
        deque(lines, maxlen=0)


@contextmanager
def serving(database_url: str, uploads: Path, *arguments: str, **settings: str) -> Iterator[Served]:
    """A server that ends with the block, and does so when it is asked to."""
    served = begin(database_url, uploads, *arguments, **settings)
    try:
        yield served
    finally:
        served.end()


@dataclass
class Site:
    """A server with something in its record."""

    served: Served
    db: Database
    world: World
    keys: dict[str, str]  #: by scope; each has that one only
    done: int  #: a finished job, of the key "submit"
    waiting: int  #: one that nobody prepares, of nobody's

    def ask(self, method: str, path: str, scope: str = "admin", **options: Any) -> httpx.Response:
        return self.served.ask(method, path, self.keys[scope], **options)

    def body(self, **changes: Any) -> dict[str, Any]:
        """A spec of the world's job, small."""
        return self.world.fields(**_small(self.world) | changes)


def _small(world: World) -> dict[str, Any]:
    short = {"jsonl": str(world.prompts), "id": "id", "group": "file", "ends": "text", "samples": 8}
    return {"benchmarks": [short], "policies": ["full", {"confidence": {"threshold": 0.6}}]}


@contextmanager
def opened_site(url: str, uploads: Path, world: World) -> Iterator[Site]:
    with closing(open_database(url)) as db:
        keys = {scope.value: create_key(db, f"{scope}-key", [scope])[0] for scope in Scope}
        done = jobs.submit(db, world.spec(**_small(world)), principal="submit-key")
        assert jobs.work(db, done, inline=True) is jobs.JobState.DONE
        waiting = jobs.submit(db, world.spec(name="waiting"), principal="somebody")
        with serving(url, uploads, "--allow", str(world.folder)) as served:
            yield Site(served, db, world, keys, done, waiting)
