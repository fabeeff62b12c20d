"""Who gets in: each scope at each endpoint, keys that are none, browsers, other sites, an open server."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Served, Site, begin, serving

from db import jobs, keys
from db.keys import create_key, revoke_key
from db.session import Database

#: operation -> the scope that it needs; None: everybody
OPERATIONS = {
    ("POST", "/v1/jobs"): "submit",
    ("GET", "/v1/jobs"): "read",
    ("POST", "/v1/validate"): "submit",
    ("GET", "/v1/jobs/{job_id}"): "read",
    ("POST", "/v1/jobs/{job_id}/cancel"): "submit",
    ("POST", "/v1/jobs/{job_id}/pause"): "submit",
    ("POST", "/v1/jobs/{job_id}/retry"): "submit",
    ("POST", "/v1/jobs/{job_id}/resume"): "submit",
    ("POST", "/v1/jobs/{job_id}/policies"): "submit",
    ("GET", "/v1/jobs/{job_id}/report"): "read",
    ("GET", "/v1/jobs/{job_id}/events"): "read",
    ("GET", "/v1/jobs/{job_id}/completions"): "read",
    ("GET", "/v1/jobs/{job_id}/tokens"): "read",
    ("POST", "/v1/schedules"): "submit",
    ("GET", "/v1/schedules"): "read",
    ("GET", "/v1/schedules/{name}"): "read",
    ("DELETE", "/v1/schedules/{name}"): "submit",
    ("POST", "/v1/schedules/{name}/pause"): "submit",
    ("POST", "/v1/schedules/{name}/resume"): "submit",
    ("POST", "/v1/schedules/{name}/trigger"): "submit",
    ("POST", "/v1/schedules/{name}/resend"): "submit",
    ("GET", "/v1/jobs/{job_id}/labels"): "read",
    ("POST", "/v1/jobs/{job_id}/labels"): "submit",
    ("POST", "/v1/query"): "query",
    ("POST", "/v1/uploads"): "submit",
    ("GET", "/v1/models"): "read",
    ("GET", "/v1/benchmarks/{name}"): "read",
    ("GET", "/v1/benchmarks"): "read",
    ("GET", "/v1/policies"): "read",
    ("GET", "/v1/workers"): "read",
    ("GET", "/v1/status"): "read",
    ("GET", "/v1/compare"): "read",
    ("POST", "/v1/gate"): "read",
    ("POST", "/v1/done-before"): "submit",
    ("GET", "/metrics"): "read",
    ("GET", "/healthz"): None,
    ("GET", "/readyz"): None,
    ("POST", "/v1/session"): None,
    ("GET", "/v1/session"): "any",
    ("DELETE", "/v1/session"): "any",
}


def slug(answer: httpx.Response) -> str:
    return str(answer.json()["type"]).rsplit(":", 1)[1]


def test_every_operation_of_the_document_stands_here(site: Site) -> None:
    paths = site.served.ask("GET", "/v1/openapi.json").json()["paths"]
    assert {(method.upper(), path) for path, methods in paths.items() for method in methods} == set(OPERATIONS)


@pytest.mark.parametrize("scope", ["read", "submit", "query", "admin", None, "unknown"])
def test_each_scope_at_each_operation(site: Site, scope: str | None) -> None:
    """In where its scope is asked for, 403 elsewhere, and 401 without a key; nothing is changed by who is refused."""
    key = {None: None, "unknown": "shortstop_0123456789ab_" + "x" * 43}.get(scope) or site.keys.get(scope or "")
    before = [jobs.job(site.db, job_id) for job_id in (site.done, site.waiting)]
    for (method, path), needed in OPERATIONS.items():
        if scope == "admin" and path.endswith(("cancel", "pause", "retry", "resume")):
            continue  # it may, and would
        of_ended = path.endswith(("events", "labels"))
        target = path.replace("{job_id}", str(site.done if of_ended else site.waiting))
        target = target.replace("{name}", "nothing-of-that-name")
        target += f"?a={site.done}" if path == "/v1/compare" else ""
        answer = site.served.ask(method, target, key)  # without a body: who may gets as far as its absence
        got = (method, path, scope, answer.status_code, answer.text)
        if needed is None:
            assert answer.status_code in (200, 415), got
        elif scope in (None, "unknown"):
            assert (answer.status_code, slug(answer)) == (401, "unauthenticated"), got
            assert answer.headers["www-authenticate"].startswith("Bearer"), got
            time.sleep(0.11)  # strangers are slowed down
        elif needed in ("any", scope) or scope == "admin":
            # there is no schedule of that name, nor a benchmark
            assert answer.status_code in ((200, 204, 404, 422) if "{name}" in path else (200, 204, 403, 415)), got
            assert answer.status_code != 403 or "is 'somebody''s" in answer.json()["detail"].replace('"', "'"), got
        else:
            assert (answer.status_code, slug(answer)) == (403, "forbidden"), got
            assert needed in answer.json()["detail"], got
    assert [jobs.job(site.db, job_id) for job_id in (site.done, site.waiting)] == before


@pytest.mark.parametrize("verb", ["cancel", "pause", "retry", "resume", "policies"])
def test_nobody_but_an_admin_changes_the_jobs_of_others(site: Site, verb: str) -> None:
    before = jobs.job(site.db, site.waiting)
    answer = site.ask("POST", f"/v1/jobs/{site.waiting}/{verb}", "submit", json="full")
    assert (answer.status_code, slug(answer)) == (403, "forbidden")
    assert "somebody" in answer.json()["detail"]
    assert jobs.job(site.db, site.waiting) == before


@pytest.mark.parametrize(
    "written",
    ["", "Bearer", "Bearer  x", "Basic YTpi", "bearer x", "Bearer \xff", "Bearer " + "a" * 5000, "shortstop_1"],
)
def test_what_is_no_key_lets_nobody_in(site: Site, written: str) -> None:
    time.sleep(0.15)
    answer = site.served.ask("GET", "/v1/jobs", headers={"Authorization": written.encode("latin-1")})
    assert answer.status_code == 401, answer.text


def test_a_revoked_or_expired_key_is_out_at_the_next_request(site: Site) -> None:
    key, row = create_key(site.db, "short", ["read"])
    ending, _ = create_key(site.db, "ending", ["read"], lifetime_s=1.0)
    assert site.served.ask("GET", "/v1/jobs", key).status_code == 200
    assert site.served.ask("GET", "/v1/jobs", ending).status_code == 200
    revoke_key(site.db, row.id)
    assert site.served.ask("GET", "/v1/jobs", key).status_code == 401
    time.sleep(1.1)
    assert site.served.ask("GET", "/v1/jobs", ending).status_code == 401


def test_an_open_stream_ends_with_its_key(site: Site) -> None:
    job_id = jobs.create_job(site.db, name="watched", spec={"model": "m"})
    key, row = create_key(site.db, "short", ["read"])
    headers = {"Authorization": f"Bearer {key}"}
    began = time.monotonic()
    with httpx.stream("GET", f"{site.served.url}/v1/jobs/{job_id}/events", headers=headers, timeout=30) as answer:
        lines = answer.iter_lines()
        next(lines)
        revoke_key(site.db, row.id)
        assert not [line for line in lines if line.startswith('data: {"error')]
    assert time.monotonic() - began < 25


# --- browsers -----------------------------------------------------------------------------------------------------


@contextmanager
def logged_in(served: Served, key: str) -> Iterator[tuple[httpx.Client, str, str]]:
    with httpx.Client(base_url=served.url, timeout=60) as browser:
        answer = browser.post("/v1/session", json={"key": key})
        assert answer.status_code == 201, answer.text
        yield browser, answer.json()["csrf_token"], answer.headers["set-cookie"]


def test_a_browser_logs_in_acts_and_logs_out(site: Site) -> None:
    with logged_in(site.served, site.keys["submit"]) as (browser, token, cookie):
        _acts(site, browser, token, cookie)


def _acts(site: Site, browser: httpx.Client, token: str, cookie: str) -> None:
    for part in ("HttpOnly", "SameSite=strict", "Path=/"):
        assert part.lower() in cookie.lower()
    assert site.keys["submit"] not in cookie
    assert browser.get("/v1/session").json() == {"principal": "submit-key", "scopes": ["submit"], "csrf_token": token}
    body = site.body(name="from a browser")
    for headers in ({}, {"X-CSRF-Token": "x"}, {"X-CSRF-Token": token[:-1]}):
        refused = browser.post("/v1/jobs", json=body, headers=headers)
        assert (refused.status_code, slug(refused)) == (403, "cross-site")
    good = {"X-CSRF-Token": token}
    for evil in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        refused = browser.post("/v1/jobs", json=body, headers=good | evil)
        assert (refused.status_code, slug(refused)) == (403, "cross-site")
    before = len(jobs.list_jobs(site.db))
    done = browser.post("/v1/jobs", json=body, headers=good | {"Origin": site.served.url})
    assert done.status_code == 202
    assert len(jobs.list_jobs(site.db)) == before + 1
    assert jobs.job(site.db, done.json()["job"]).principal == "submit-key"
    kept = dict(browser.cookies)
    assert browser.delete("/v1/session").status_code == 403  # that too changes something
    assert browser.delete("/v1/session", headers=good).status_code == 204
    for name, value in kept.items():
        answer = site.served.ask("GET", "/v1/session", headers={"Cookie": f"{name}={value}"})
        assert answer.status_code == 401


def test_a_browser_is_out_with_its_key(site: Site) -> None:
    key, row = create_key(site.db, "her", ["read"])
    with logged_in(site.served, key) as (browser, _, _):
        assert browser.get("/v1/jobs").status_code == 200
        revoke_key(site.db, row.id)
        assert browser.get("/v1/jobs").status_code == 401


@pytest.mark.parametrize("body", [{"key": "x"}, {"key": ""}, {"key": None}, {}, [], "x", {"key": {"a": 1}}])
def test_no_key_no_session(site: Site, body: Any) -> None:
    time.sleep(0.15)
    answer = site.served.ask("POST", "/v1/session", json=body)
    assert answer.status_code in (401, 422)
    assert "set-cookie" not in answer.headers
    evil = site.served.ask("POST", "/v1/session", json={"key": site.keys["read"]}, headers={"Origin": "https://evil"})
    assert evil.status_code == 403


# --- a server without keys, and how many requests ---------------------------------------------------------------


def test_without_keys_this_machine_is_let_in_and_no_page_of_another_site(sqlite_db: Database, tmp_path: Path) -> None:
    """A page that a browser here shows can lead it here: under another name, or with a request of its own."""
    with serving(sqlite_db.url, tmp_path / "uploads") as served:
        assert served.ask("GET", "/v1/session").json()["principal"] == "local"
        port = served.port
        for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", "LOCALHOST"):
            assert served.ask("GET", "/v1/jobs", headers={"Host": host}).status_code == 200, host
        for host in ("evil.example", f"127.0.0.1.evil.example:{port}", "10.0.0.1", "[", "", "a b"):
            answer = served.ask("GET", "/v1/jobs", headers={"Host": host})
            assert answer.status_code in (400, 421), (host, answer.status_code)
        for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
            answer = served.ask("POST", "/v1/jobs/1/cancel", headers=headers)
            assert (answer.status_code, slug(answer)) == (403, "cross-site"), headers
        for name in ("Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP"):
            answer = served.ask("GET", "/v1/jobs", headers={name: "203.0.113.7"})
            assert (answer.status_code, slug(answer)) == (421, "misdirected"), name
            assert "came through a proxy" in answer.json()["detail"]
        assert served.ask("POST", "/v1/jobs", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
        create_key(sqlite_db, "first", ["read"])
        assert served.ask("GET", "/v1/jobs").status_code == 401  # at once, without a restart


def test_beyond_this_machine_only_with_a_key(sqlite_db: Database, tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).parent / "shortstop"),
        "serve",
        "--no-fleet",
        "--host",
        "0.0.0.0",
        "--port",
        "0",
    ]
    command += ["--database", sqlite_db.url]

    def refused() -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        return done.stderr

    assert re.fullmatch(r"shortstop: host '0\.0\.0\.0' is open to others, .*\n", refused())
    create_key(sqlite_db, "first", ["read"], lifetime_s=-1)
    assert "there is no API key" in refused()  # one that lets nobody in is none
    create_key(sqlite_db, "second", ["read"])
    served = begin(sqlite_db.url, tmp_path / "uploads", "--host", "0.0.0.0")
    try:
        served.url = f"http://127.0.0.1:{served.port}"
        assert served.ask("GET", "/v1/jobs").status_code == 401
    finally:
        served.end()


def test_a_host_that_cannot_be_is_one_sentence(sqlite_db: Database) -> None:
    create_key(sqlite_db, "first", ["read"])
    command = [str(Path(sys.executable).parent / "shortstop"), "serve", "--no-fleet", "--database", sqlite_db.url]
    done = subprocess.run([*command, "--host", "a" * 300], capture_output=True, text=True, timeout=60)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "there is no such address" in done.stderr


def test_a_port_that_is_taken_is_one_sentence(sqlite_db: Database, tmp_path: Path) -> None:
    with serving(sqlite_db.url, tmp_path / "uploads") as served:
        command = [str(Path(sys.executable).parent / "shortstop"), "serve", "--no-fleet", "--port", str(served.port)]
        done = subprocess.run([*command, "--database", sqlite_db.url], capture_output=True, text=True, timeout=60)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert f"port {served.port}" in done.stderr


def test_each_key_has_its_own_rate(sqlite_db: Database, tmp_path: Path) -> None:
    fast, slow = (create_key(sqlite_db, name, ["read"])[0] for name in ("fast", "slow"))
    with serving(sqlite_db.url, tmp_path / "uploads", requests_per_second="2") as served:
        answers = [served.ask("GET", "/v1/models", fast) for _ in range(12)]
        last = next(answer for answer in answers if answer.status_code == 429)
        assert slug(last) == "too-many-requests"
        assert int(last.headers["retry-after"]) >= 1
        assert [answer.status_code for answer in answers[:4]] == [200] * 4
        assert served.ask("GET", "/v1/models", slow).status_code == 200
        time.sleep(1.2)
        assert served.ask("GET", "/v1/models", fast).status_code == 200


def test_strangers_are_slowed_down(sqlite_db: Database, tmp_path: Path) -> None:
    key = create_key(sqlite_db, "known", ["read"])[0]
    with serving(sqlite_db.url, tmp_path / "uploads") as served:
        statuses = {served.ask("GET", "/v1/models", "shortstop_wrong").status_code for _ in range(60)}
        assert statuses == {401, 429}
        assert served.ask("GET", "/v1/models", key).status_code == 200
        assert keys.any_key(sqlite_db)
