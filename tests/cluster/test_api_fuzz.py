"""Whatever is sent, the server answers with a problem and never with a fault of its own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from served import Site

from db import jobs

QUICK = settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.generate],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
PATHS = ["/v1/jobs/{}", "/v1/jobs/{}/completions", "/v1/jobs/{}/tokens", "/v1/jobs/{}/events", "/v1/jobs/{}/report"]


def sound(answer: httpx.Response) -> httpx.Response:
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.headers["content-type"] == "application/problem+json"
        told = answer.json()
        assert told["type"].startswith("urn:shortstop:problem:")
        assert told["status"] == answer.status_code
        assert len(told["detail"].splitlines()) == 1
    return answer


@QUICK
@given(st.integers() | st.text(max_size=30) | st.sampled_from(["0", "-1", "1.0", "1e9", "01", "%00", "..", "1;", "١"]))
def test_ids(site: Site, job_id: object) -> None:
    from urllib.parse import quote

    for path in PATHS[:3]:
        answer = sound(site.ask("GET", path.format(quote(str(job_id), safe="%"))))
        assert answer.status_code in (200, 404, 422, 405, 400)


@QUICK
@given(st.text(max_size=60), st.integers() | st.text(max_size=10), st.text(max_size=10))
def test_cursors_limits_and_filters(site: Site, cursor: str, limit: object, other: str) -> None:
    for path in ("/v1/jobs", f"/v1/jobs/{site.done}/completions", f"/v1/jobs/{site.done}/tokens"):
        for params in (
            {"cursor": cursor},
            {"limit": limit},
            {"format": other, "run": limit},
            {"state": other, "search": other, "principal": cursor},
        ):
            sound(site.ask("GET", path, params=params))


CURSORS = [
    "W10",
    "WzFd",
    "WzEsMl0",
    "WzEsMiwzXQ",
    "Wy0xXQ",
    "WzFlOTk5XQ",
    "W3RydWVd",
    "eyJhIjoxfQ",
    "bnVsbA",
]


@pytest.mark.parametrize("cursor", [*CURSORS, "A" * 100, "=", "WzFd=", "!!!"])
def test_cursors_that_are_nearly_right(site: Site, cursor: str) -> None:
    for path in ("/v1/jobs", f"/v1/jobs/{site.done}/completions", f"/v1/jobs/{site.done}/tokens"):
        for form in ("json", "ndjson"):
            sound(site.ask("GET", path, params={"cursor": cursor, "format": form}))


@QUICK
@given(st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=300))
def test_headers(site: Site, value: str) -> None:
    raw = value.strip().encode("latin-1")
    for name in ("Idempotency-Key", "Last-Event-ID", "Content-Type", "Accept", "Cookie", "Origin", "X-CSRF-Token"):
        headers = {"Authorization": f"Bearer {site.keys['admin']}", name: raw}
        sound(site.served.ask("GET", "/v1/jobs", headers=headers))
        if name in ("Idempotency-Key", "Content-Type"):
            sound(site.served.ask("POST", "/v1/jobs", headers=headers, content=b"{}"))
        if name == "Last-Event-ID":
            sound(site.served.ask("GET", f"/v1/jobs/{site.done}/events", headers=headers))


@QUICK
@given(JSON)
def test_bodies(site: Site, value: Any) -> None:
    before = len(jobs.list_jobs(site.db))
    content = json.dumps(value).encode()
    for path in (
        "/v1/jobs",
        "/v1/validate",
        "/v1/gate",
        "/v1/done-before",
        f"/v1/jobs/{site.done}/policies",
        "/v1/query",
        "/v1/session",
    ):
        headers = {"Content-Type": "application/json"}
        sound(site.ask("POST", path, content=content, headers=headers))
    assert len(jobs.list_jobs(site.db)) == before


FIELDS = ["name", "model", "exits", "seed", "priority", "threads", "generation", "benchmarks", "policies", "metrics"]


@QUICK
@given(st.sampled_from(FIELDS), JSON)
def test_specs_with_one_field_that_is_something_else(site: Site, field: str, value: Any) -> None:
    """A job that is accepted can be shown, listed and reported."""
    content = json.dumps(site.body() | {field: value}).encode()
    answer = sound(site.ask("POST", "/v1/jobs", content=content, headers={"Content-Type": "application/json"}))
    if answer.status_code == 202:
        job_id = answer.json()["job"]
        for path in (f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}/report", "/v1/jobs"):
            assert site.ask("GET", path).status_code == 200


BODIES = [
    b"",
    b"{",
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    b"[" * 100_000,
    b'{"a":' * 5_000,
    b'{"name": "\\u0000"}',
    b'{"name": "\\ud800"}',
    b'{"\\u0000": 1}',
    b'{"seed": NaN}',
    b'{"seed": 1e999}',
    b'{"seed": ' + b"9" * 5000 + b"}",
    b'{"seed": 99999999999999999999}',
    b'{"a": 1, "a": 2}',
    b'"x"',
    b"0",
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:20]))
def test_bodies_that_are_nearly_json(site: Site, body: bytes) -> None:
    for path in ("/v1/jobs", "/v1/validate", f"/v1/jobs/{site.done}/policies", "/v1/query", "/v1/session"):
        answer = sound(site.ask("POST", path, content=body, headers={"Content-Type": "application/json"}))
        assert answer.status_code in (400, 413, 415, 422)


RAW = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET /v1/jobs HTTP/9.9\r\nHost: localhost\r\n\r\n",
    b"\x00\x01\x02\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/jobs HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
    b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /v1/jobs/%ff%fe HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/jobs/../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://evil.example/v1/jobs HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]


@pytest.mark.parametrize("raw", RAW, ids=lambda raw: repr(raw[:40]))
def test_what_is_hardly_http(site: Site, raw: bytes) -> None:
    """Refused or cut off; the next one is served."""
    with socket.create_connection(("127.0.0.1", site.served.port), timeout=10) as line:
        line.sendall(raw)
        line.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while piece := line.recv(65536):
                answer += piece
        except (ConnectionError, TimeoutError):
            pass
    assert not answer.startswith((b"HTTP/1.1 5", b"HTTP/1.1 2")), answer[:200]
    assert site.served.ask("GET", "/healthz").status_code == 200


def schemathesis(site: Site, *options: str) -> str:
    """Its run over the document: no fault of the server, and no answer that the document does not tell of."""
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{site.served.url}/v1/openapi.json"]
    command += ["-H", f"Authorization: Bearer {site.keys['admin']}", "--seed", "1", "--no-color"]
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    # a stream of events ends with its job, which may be never (test_api_jobs listens to it); it makes no archives
    # (test_api_uploads does)
    command += ["--checks", checks, "--exclude-path", "/v1/jobs/{job_id}/events", "--exclude-path", "/v1/uploads"]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"}, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert site.served.ask("GET", "/readyz").status_code == 200
    return done.stdout


def test_the_document_holds_under_generated_requests(site: Site) -> None:
    # the model of the examples takes a minute to convert: the slow test validates them
    options = ("--phases", "coverage,fuzzing", "--max-examples", "4", "--request-timeout", "300")
    print(schemathesis(site, *options).splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_document_holds_under_many_generated_requests(site: Site) -> None:
    print(schemathesis(site, "--max-examples", "100", "--request-timeout", "600").splitlines()[-1])
