"""Load on a server, from a process of its own and with little of the machine: bare HTTP/1.1 over kept connections."""

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Task:
    """What each client does: the same request so many times, one after the other."""

    url: str
    keys: list[str]  #: a client each
    method: str
    path: str
    times: int
    body: str = ""
    idempotency: str = ""  #: begins each Idempotency-Key; none is sent when empty


@dataclass(frozen=True)
class Load:
    """What came of it."""

    seconds: float  #: from the first request to the last answer
    latencies: list[float]  #: seconds, of every request
    statuses: dict[str, int]  #: how many answers of each status; "lost" where the line broke
    jobs: list[int]  #: numbers of jobs that the answers name


def put(task: Task) -> Load:
    """Put the load on, from another process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.load"], input=json.dumps(asdict(task)), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return Load(**json.loads(done.stdout))


async def _all(task: Task) -> Load:
    latencies: list[float] = []
    statuses: dict[str, int] = {}
    jobs: list[int] = []
    began = time.perf_counter()
    clients = (_client(task, number, key, latencies, statuses, jobs) for number, key in enumerate(task.keys))
    await asyncio.gather(*clients)
    return Load(time.perf_counter() - began, latencies, statuses, jobs)


async def _client(
    task: Task, number: int, key: str, latencies: list[float], statuses: dict[str, int], jobs: list[int]
) -> None:
    address = urlsplit(task.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        for turn in range(task.times):
            began = time.perf_counter()
            writer.write(_request(task, key, f"{task.idempotency}-{number}-{turn}"))
            status, body = await _answer(reader)
            latencies.append(time.perf_counter() - began)
            statuses[status] = statuses.get(status, 0) + 1
            if status == "202":
                jobs.append(json.loads(body)["job"])
    except (ConnectionError, asyncio.IncompleteReadError):
        statuses["lost"] = statuses.get("lost", 0) + 1
    finally:
        writer.close()


def _request(task: Task, key: str, idempotency: str) -> bytes:
    lines = [f"{task.method} {task.path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {key}"]
    if task.body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(task.body.encode())}"]
    if task.idempotency:
        lines.append(f"Idempotency-Key: {idempotency}")
    return ("\r\n".join(lines) + "\r\n\r\n" + task.body).encode()


async def _answer(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return head.split(b" ", 2)[1].decode(), await reader.readexactly(length)


if __name__ == "__main__":
    print(json.dumps(asdict(asyncio.run(_all(Task(**json.load(sys.stdin)))))))
