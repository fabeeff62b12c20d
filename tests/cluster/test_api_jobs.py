"""Jobs over HTTP, on a real server and each database: submitted once, listed, watched, changed, reported, read."""

import io
import json
import threading
import time
from typing import Any

import httpx
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from made import claimed, planned_job, results_of
from served import Site

import cluster.jobs
from cluster.local import Local
from cluster.settings import load_settings
from db import events, figures, jobs, queue, results
from db.records import JobState


def problem(answer: httpx.Response, slug: str, status: int) -> str:
    """The sentence of an answer that is this problem."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    told = answer.json()
    assert (told["type"], told["status"], answer.status_code) == (f"urn:shortstop:problem:{slug}", status, status), told
    return str(told["detail"])


def test_a_job_is_accepted_and_its_place_named(site: Site) -> None:
    answer = site.ask("POST", "/v1/jobs", "submit", json=site.body(name="mine"))
    job_id = answer.json()["job"]
    assert (answer.status_code, answer.headers["location"]) == (202, f"/v1/jobs/{job_id}")
    row = jobs.job(site.db, job_id)
    assert (row.name, row.principal, row.state) == ("mine", "submit-key", JobState.PREPARING)
    [event] = events.events(site.db, job_id)
    assert (event.who, event.what) == ("submit-key", "submitted")
    assert site.ask("GET", answer.headers["location"]).json()["job"]["spec"]["name"] == "mine"


def test_the_same_key_and_spec_are_one_job(site: Site) -> None:
    def submit(name: str, key: str = "nightly", scope: str = "submit") -> httpx.Response:
        return site.ask("POST", "/v1/jobs", scope, json=site.body(name=name), headers={"Idempotency-Key": key})

    first, again, other = submit("once"), submit("once"), submit("twice")
    assert first.json() == again.json()
    assert again.status_code == 202
    assert "which was submitted with another spec" in problem(other, "conflict", 409)
    assert submit("once", scope="admin").json() != first.json()  # another principal's keys are their own
    assert "idempotency-key" in problem(submit("once", "ü".encode()), "bad-input", 422).lower()  # type: ignore[arg-type]


def test_many_at_once_with_one_key_are_one_job(site: Site) -> None:
    found: list[int] = []

    def submit() -> None:
        headers = {"Idempotency-Key": "at once"[:2]}
        found.append(site.ask("POST", "/v1/jobs", "submit", json=site.body(name="race"), headers=headers).json()["job"])

    threads = [threading.Thread(target=submit) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "smolm2-135m"}, "not among what this server allows"),
        ({"policies": ["ful"]}, "did you mean 'full'?"),
        ({"benchmarks": ["humaneval-line"]}, "did you mean 'humaneval-lines'?"),
        ({"generation": {"max_new_tokens": 0}}, "max_new_tokens"),
        ({"colour": "blue"}, "colour"),
        ({"name": ""}, "name"),
    ],
)
def test_bad_specs_are_one_sentence_and_change_nothing(site: Site, changes: dict[str, Any], sentence: str) -> None:
    before = len(jobs.list_jobs(site.db))
    for path in ("/v1/jobs", "/v1/validate"):
        assert sentence in problem(site.ask("POST", path, "submit", json=site.body(**changes)), "bad-input", 422)
    assert len(jobs.list_jobs(site.db)) == before


def test_validate_says_what_the_job_would_do_and_writes_nothing(site: Site) -> None:
    before = len(jobs.list_jobs(site.db))
    found = site.ask("POST", "/v1/validate", "submit", json=site.body()).json()
    assert [(one["samples"], one["batches"], one["shards"]) for one in found["benchmarks"]] == [(8, 2, 1)]
    assert found["policies"] == ["full", "confidence threshold=0.6"]
    assert len(jobs.list_jobs(site.db)) == before


def test_the_list_is_paged_without_loss_while_jobs_come(site: Site) -> None:
    for number in range(7):
        jobs.create_job(site.db, name=f"page {number}", spec={"model": "paged"})
    page = site.ask("GET", "/v1/jobs", "read", params={"limit": 3, "search": "PAGE"}).json()
    names = [row["name"] for row in page["jobs"]]
    jobs.create_job(site.db, name="page late", spec={"model": "paged"})
    while page["next"]:
        page = site.ask("GET", "/v1/jobs", "read", params={"limit": 3, "search": "PAGE", "cursor": page["next"]}).json()
        names += [row["name"] for row in page["jobs"]]
    assert names == [f"page {number}" for number in reversed(range(7))]


def test_the_list_is_filtered(site: Site) -> None:
    def found(**params: Any) -> list[int]:
        return [row["id"] for row in site.ask("GET", "/v1/jobs", "read", params=params).json()["jobs"]]

    odd = jobs.create_job(site.db, name="100%_\\ sure", spec={"model": "m"}, principal="her")
    assert found(search="100%_\\") == found(principal="her") == [odd]
    assert found(search="%%") == []
    assert found(state="done") == [site.done]
    assert site.done in found(state=["done", "preparing"], limit=1000)
    assert found(search="no such job") == []


def test_changing_a_job_is_written_down_with_who_did_it(site: Site) -> None:
    job_id = site.ask("POST", "/v1/jobs", "submit", json=site.body(name="changed")).json()["job"]
    assert site.ask("POST", f"/v1/jobs/{job_id}/pause", "submit").json()["paused"] is True
    assert site.ask("POST", f"/v1/jobs/{job_id}/resume", "admin").json()["job"]["paused"] is False
    assert site.ask("POST", f"/v1/jobs/{job_id}/cancel", "submit").json()["state"] == "cancelled"
    told = [(event.who, event.what) for event in events.events(site.db, job_id)]
    assert told == [
        ("submit-key", "submitted"),
        ("submit-key", "paused"),
        ("admin-key", "resumed"),
        ("submit-key", "cancelled"),
    ]
    for verb, what in (("cancel", "cancelled"), ("pause", "paused")):
        sentence = f"job {job_id} is cancelled; only a job that has not ended can be {what}."
        assert problem(site.ask("POST", f"/v1/jobs/{job_id}/{verb}", "submit"), "conflict", 409) == sentence
    assert "no dead task" in problem(site.ask("POST", f"/v1/jobs/{job_id}/retry", "submit"), "conflict", 409)
    for verb in ("cancel", "pause", "retry", "resume"):
        problem(site.ask("POST", f"/v1/jobs/{2**40}/{verb}", "admin"), "missing", 404)


def test_dead_tasks_are_retried(site: Site) -> None:
    job_id = planned_job(site.db, 8)
    for _ in range(queue.MAX_ATTEMPTS):
        assert queue.claim(site.db, "doomed", kind="shard", job_id=job_id) is not None
        queue.reap(site.db, dead_workers=["doomed"])
    [dead] = site.ask("GET", f"/v1/jobs/{job_id}", "read").json()["dead"]
    assert site.ask("POST", f"/v1/jobs/{job_id}/retry", "admin").json()["tasks"] == 1
    lease = claimed(site.db, "lives", job_id=job_id)
    assert lease.task_id == dead["id"]
    held = [row for row in site.ask("GET", "/v1/workers", "read").json() if row["worker"] == "lives"]
    assert [(row["job_id"], row["task_id"]) for row in held] == [(job_id, lease.task_id)]
    assert 0 < held[0]["lease_left"] <= 30


def test_the_status_is_that_of_the_record(site: Site) -> None:
    """Who works on what, how fast, of all jobs or of one; two looks at a server are a rate."""
    job_id = planned_job(site.db, 8)
    lease = claimed(site.db, "1@north", job_id=job_id)
    first = site.ask("GET", "/v1/status", "read").json()
    assert [one["job"] for one in first["jobs"]] == figures.open_jobs(site.db)
    assert first["nodes"]["north"] == 1
    results.commit_shard(site.db, lease, results_of(site.db, lease))
    of_one = site.ask("GET", f"/v1/status?job={job_id}", "read").json()
    [mine] = of_one["jobs"]
    assert (mine["batches_done"], mine["batches_total"], of_one["workers"]) == (2, 4, [])
    assert mine["batches_per_second"] > 0
    assert site.ask("GET", f"/v1/status?job={site.done}", "read").json()["jobs"][0]["state"] == "done"
    problem(site.ask("GET", f"/v1/status?job={2**40}", "read"), "missing", 404)
    problem(site.ask("GET", "/v1/status?job=x", "read"), "bad-input", 422)
    jobs.cancel_job(site.db, job_id)


def test_what_happened_comes_as_one_document_too(site: Site) -> None:
    job_id = planned_job(site.db, 8)
    path = f"/v1/jobs/{job_id}/events?format=json"
    told = site.ask("GET", path, "read")
    assert told.headers["content-type"] == "application/json"
    assert [one["what"] for one in told.json()] == ["submitted", "planned"]
    after = {"Last-Event-ID": str(told.json()[0]["id"])}
    assert [one["what"] for one in site.ask("GET", path, "read", headers=after).json()] == ["planned"]
    problem(site.ask("GET", f"/v1/jobs/{job_id}/events?format=xml", "read"), "bad-input", 422)


def test_a_policy_is_added_to_a_finished_job(site: Site) -> None:
    """By its label, once; only to a job that is done. The work is somebody else's."""
    path = f"/v1/jobs/{site.done}/policies"
    assert "another name" in problem(site.ask("POST", path, "submit", json="full"), "conflict", 409)
    assert "did you mean" in problem(site.ask("POST", path, "submit", json="confidenc"), "bad-input", 422)
    problem(site.ask("POST", f"/v1/jobs/{site.waiting}/policies", json="full"), "conflict", 409)
    for wrong in (7, [], True):
        problem(site.ask("POST", path, "submit", json=wrong), "bad-input", 422)
    asked = {"patience": {"patience": 1}}
    answer = site.ask("POST", path, "submit", json=asked)
    assert (answer.status_code, answer.json()) == (202, {"job": site.done, "policy": "patience patience=1"})
    assert site.ask("GET", f"/v1/jobs/{site.done}/report", "read").json()["partial"] is True
    assert cluster.jobs.work(site.db, site.done, inline=True) is JobState.DONE
    assert len(jobs.runs(site.db, site.done)) == 3


def test_the_report_is_the_one_that_a_local_caller_gets(site: Site) -> None:
    found = site.ask("GET", f"/v1/jobs/{site.done}/report", "read")
    local = Local(load_settings(), site.db).report(site.done)
    assert found.json() == json.loads(local.model_dump_json())
    page = site.ask("GET", f"/v1/jobs/{site.done}/report?format=html", "read")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<html" in page.text
    waiting = site.ask("GET", f"/v1/jobs/{site.waiting}/report", "read").json()
    assert (waiting["partial"], waiting["benchmarks"]) == (True, [])


# --- rows ---------------------------------------------------------------------------------------------------------


def paged(site: Site, path: str, limit: int, **params: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    following: str | None = ""
    while following is not None:
        query = params | {"limit": limit} | ({"cursor": following} if following else {})
        page = site.ask("GET", path, "read", params=query).json()
        assert len(page["rows"]) <= limit
        found += page["rows"]
        following = page["next"]
    return found


@pytest.mark.parametrize("noun", ["completions", "tokens"])
def test_pages_and_downloads_hold_the_same_rows(site: Site, noun: str) -> None:
    """Whatever the size of a page and the format, and from the middle as well."""
    path = f"/v1/jobs/{site.done}/{noun}"
    whole = paged(site, path, 1000)
    assert len(whole) >= 16
    assert paged(site, path, 3) == whole
    lines = site.ask("GET", path, "read", params={"format": "ndjson"}).text.splitlines()
    assert [json.loads(line) for line in lines] == [
        {name: row.get(name) for name in json.loads(lines[0])} for row in whole
    ]
    table = pq.read_table(io.BytesIO(site.ask("GET", path, "read", params={"format": "parquet"}).content))
    assert table.to_pylist() == [json.loads(line) for line in lines]
    answer = site.ask("GET", path, "read", params={"format": "csv"})
    assert answer.headers["content-disposition"] == f'attachment; filename="job-{site.done}.csv"'
    assert pyarrow.csv.read_csv(io.BytesIO(answer.content)).num_rows == len(whole)
    page = site.ask("GET", path, "read", params={"limit": 5}).json()
    rest = site.ask("GET", path, "read", params={"format": "ndjson", "cursor": page["next"]}).text.splitlines()
    assert rest == lines[5:]


def test_rows_of_one_run(site: Site) -> None:
    [first, *_] = jobs.runs(site.db, site.done)
    rows = paged(site, f"/v1/jobs/{site.done}/completions", 3, run=first.id)
    assert {row["run_id"] for row in rows} == {first.id}
    assert len(rows) == 8
    other = jobs.create_job(site.db, name="other", spec={"model": "m"})
    problem(site.ask("GET", f"/v1/jobs/{other}/tokens", params={"run": first.id}), "missing", 404)
    assert paged(site, f"/v1/jobs/{other}/completions", 3) == paged(site, f"/v1/jobs/{other}/tokens", 3) == []


# --- questions ----------------------------------------------------------------------------------------------------


def asked(site: Site, sql: str, **options: Any) -> httpx.Response:
    return site.ask("POST", "/v1/query", "query", json={"sql": sql} | options)


def test_a_question_is_answered_in_every_form(site: Site) -> None:
    sql = "select policy, count(*) as n, sum(n_tokens) as t from completion where job_id = {} group by 1 order by 1"
    sql = sql.format(site.done)
    found = asked(site, sql).json()
    assert found["columns"] == ["policy", "n", "t"]
    assert found["more"] is False
    assert [row[1] for row in found["rows"]] == [8] * len(found["rows"])
    rows = [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]
    assert [json.loads(line) for line in asked(site, sql, format="ndjson").text.splitlines()] == rows
    columns, *arrays = map(json.loads, asked(site, sql, format="arrays").text.splitlines())
    assert (columns, arrays) == (found["columns"], found["rows"])
    assert asked(site, sql, format="csv").text.splitlines()[0] == "policy,n,t"
    some = asked(site, "select 1 as one union all select 2", limit=1).json()
    assert (some["rows"], some["more"]) == ([[1]], True)


@pytest.mark.parametrize(
    "sql",
    [
        "delete from job",
        "select * from api_key",
        "select secret_hash from api_key",
        "select * from browser_session",
        "select 1; select 2",
        "drop table job",
        "attach database '/tmp/x' as x",
        "copy job to '/tmp/x'",
        "select * from pg_authid",
        "select pg_read_file('/etc/passwd')",
        "select load_extension('x')",
        "selec 1",
        "",
    ],
)
def test_questions_read_the_views_and_nothing_else(site: Site, sql: str) -> None:
    problem(asked(site, sql), "bad-input", 422)
    assert jobs.job(site.db, site.done)


def test_a_question_that_takes_too_long_ends_with_a_problem(site: Site) -> None:
    endless = "with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n"
    assert "took longer than 0.3 s" in problem(asked(site, endless, timeout_s=0.3), "bad-input", 422)
    assert site.ask("GET", "/readyz").status_code == 200


# --- events -------------------------------------------------------------------------------------------------------


def listened(site: Site, job_id: int, last: int | None = None) -> list[tuple[str, Any]]:
    """Events until the stream ends, `(event, data)`."""
    headers = {"Authorization": f"Bearer {site.keys['read']}"} | ({} if last is None else {"Last-Event-ID": str(last)})
    found, kind = [], ""
    with httpx.stream("GET", f"{site.served.url}/v1/jobs/{job_id}/events", headers=headers, timeout=30) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("event: "):
                kind = line[7:]
            if line.startswith("data: "):
                found.append((kind, json.loads(line[6:])))
    return found


def test_events_come_as_they_happen_once_and_in_order(site: Site) -> None:
    job_id = planned_job(site.db, 8)
    found: list[tuple[str, Any]] = []
    listening = threading.Thread(target=lambda: found.extend(listened(site, job_id)))
    listening.start()
    for change in (jobs.pause_job, jobs.unpause_job, jobs.pause_job, jobs.cancel_job):
        time.sleep(0.3)
        change(site.db, job_id)
    listening.join(timeout=20)
    assert not listening.is_alive()
    told = [data for kind, data in found if kind == "job"]
    assert [one["what"] for one in told] == [event.what for event in events.events(site.db, job_id)]
    assert ("progress", {"batches_done": 0, "batches_total": 4}) in found
    for last in (told[0]["id"], told[-2]["id"]):
        again = [data for kind, data in listened(site, job_id, last) if kind == "job"]
        assert again == [one for one in told if one["id"] > last]
    ended = site.ask("GET", f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": str(told[-1]["id"])})
    assert ended.status_code == 204


def test_nobody_listens_to_a_job_that_is_not_there(site: Site) -> None:
    problem(site.ask("GET", f"/v1/jobs/{2**40}/events"), "missing", 404)
    problem(site.ask("GET", f"/v1/jobs/{site.done}/events", headers={"Last-Event-ID": "x"}), "bad-input", 422)


# --- probes -------------------------------------------------------------------------------------------------------


def test_probes(site: Site) -> None:
    assert site.served.ask("GET", "/healthz").text == site.served.ask("GET", "/readyz").text == "ok\n"
    assert "shortstop_jobs_done_total" in site.ask("GET", "/metrics", "read").text
    document = site.served.ask("GET", "/v1/openapi.json").json()
    assert document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["example"]
    assert {row["name"] for row in site.ask("GET", "/v1/policies", "read").json()} >= {"full", "sec"}
    assert {row["name"] for row in site.ask("GET", "/v1/benchmarks", "read").json()} >= {"humaneval-lines"}
    assert {row["name"] for row in site.ask("GET", "/v1/models", "read").json()} >= {"smollm2-135m"}
