"""Schedules for their users: the command line, the server and its client, and what they refuse."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from served import Site
from small_world import World
from typer.testing import CliRunner, Result

from cluster import jobs as cluster_jobs
from cluster.cli import app
from cluster.client import Client
from cluster.schedules.ticking import tick
from db import firings, jobs, schedules
from db.errors import Conflict, Missing
from db.keys import create_key
from db.schedules import database_clock
from db.session import Database
from engine.errors import BadInput


def fields(world: World, **changes: Any) -> dict[str, Any]:
    """A schedule of the world's small job that fires in a year at the earliest."""
    job = world.fields(policies=["full", {"confidence": {"threshold": 0.6}}])
    gate = {"rules": [{"metric": "es", "max_loss": 0.02}, {"metric": "es", "min": 0.5}]}
    return {"name": "nightly", "cron": "0 2 29 2 *", "zone": "Europe/Berlin", "job": job, "gate": gate} | changes


def written(folder: Path, value: dict[str, Any], name: str = "nightly.yaml") -> Path:
    file = folder / name
    file.write_text(yaml.safe_dump(value))
    return file


def call(db: Database, *arguments: object) -> Result:
    return CliRunner().invoke(app, ["schedule", *map(str, arguments), "--database", db.url])


def refusal(db: Database, *arguments: object) -> str:
    """The one sentence; and nothing was written."""
    before = schedules.schedules(db)
    result = call(db, *arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    assert schedules.schedules(db) == before
    [line] = result.stderr.splitlines()
    return line.removeprefix("shortstop: ")


# --- on the command line --------------------------------------------------------------------------------------


def test_from_its_file_to_its_end(world: World, db: Database, tmp_path: Path) -> None:
    """Added, listed, triggered, shown, paused, resumed, removed."""
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(world.fields(benchmarks=[{**_prompts(), "jsonl": "p.jsonl"}])))
    (tmp_path / "p.jsonl").write_bytes(world.prompts.read_bytes())
    value = fields(world, job="job.yaml", webhooks=["https://hooks.example.org/x"], overlap="queue")
    done = call(db, "add", written(tmp_path, value))
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("schedule nightly: fires next on 29 February 2028, 01:00 UTC")
    assert "are signed with whsec_" in done.stderr
    row = schedules.find(db, "nightly")
    assert row.spec["job"]["benchmarks"][0]["jsonl"] == str(tmp_path / "p.jsonl")  # relative to the file
    assert "whsec_" not in json.dumps(row.spec)

    assert call(db, "trigger", "nightly").stdout == "schedule nightly: job 1 submitted\n"
    assert call(db, "trigger", "nightly").stdout == "schedule nightly: queued\n"
    listed = call(db, "list").stdout
    assert "0 2 29 2 *  Europe/Berlin" in listed
    assert "under way" in listed
    jobs.fail_job(db, 1, "no disk")
    assert call(db, "tick").stdout == "fired 1, left out 0, judged 1, messages delivered 0\n"
    shown = call(db, "show", "nightly").stdout
    assert "job 1 failed: no disk" in shown
    assert "https://hooks.example.org/x  waiting" in shown
    assert call(db, "pause", "nightly").stdout == "schedule nightly: paused\n"
    assert "paused" in call(db, "list").stdout
    assert call(db, "resume", "nightly").stdout == "schedule nightly: next 29 February 2028, 01:00 UTC\n"
    assert call(db, "resend", "nightly").stdout == "schedule nightly: 1 messages are sent again\n"
    assert call(db, "remove", "nightly").stdout == "schedule nightly: removed\n"
    assert "does not exist" in refusal(db, "show", "nightly")


def _prompts() -> dict[str, Any]:
    return {"id": "id", "group": "file", "ends": "text"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"cron": "0 25 * * *"}, "schedule: cron '0 25 * * *': '25' is no hour; write 0-23, *, a-b, a,b or */n."),
        ({"cron": "0 2 * *"}, "schedule: cron '0 2 * *' has 4 parts; write five: minute, hour, "),
        ({"cron": "0 2 30 2 *"}, "schedule: cron '0 2 30 2 *': '30' is no day-of-month"),
        ({"cron": "0 2 * * MOON"}, "'MOON' is no day-of-week; write 0-7 with Sunday as 0 and 7, or SUN-SAT"),
        ({"zone": "Europe/Berln"}, "schedule: unknown zone 'Europe/Berln'; did you mean 'Europe/Berlin'?"),
        ({"zone": "berlin"}, "schedule: unknown zone 'berlin'; did you mean 'Europe/Berlin'?"),
        ({"zone": "../etc/passwd"}, "schedule: unknown zone '../etc/passwd'; "),
        ({"overlap": "never"}, "schedule: field 'overlap' is 'never'; "),
        ({"catch_up": "soon"}, "schedule: catch_up 'soon' is no age; write a number and s, m, h, d or w, like 12h."),
        ({"ends": "2026-02-30"}, "schedule: ends '2026-02-30' is no date; write it like 2027-01-31, or "),
        ({"ends": "2026-01-01"}, "ends '2026-01-01': schedule 'nightly' would never fire; give a later day."),
        ({"name": "a/b"}, "schedule: name 'a/b': give 1 to 100 letters, digits or . _ @ + -."),
        ({"job": {"model": "x"}}, "schedule: job: field 'policies' is missing; add it."),
        ({"gate": {"rules": []}}, "schedule: gate: field 'rules' is []; "),
        (
            {"gate": {"rules": [{"metric": "ess", "min": 1}]}},
            "gate: rule for 'ess': unknown metric 'ess'; did you mean",
        ),
        (
            {"gate": {"rules": [{"metric": "es", "min": 1, "policy": "ful"}]}},
            "unknown policy 'ful'; did you mean 'full'?",
        ),
        ({"baseline": "best"}, "schedule: baseline is 'best'; give last-passed, or {job: 12}, or {median: 5}."),
        ({"baseline": {"job": 1, "median": 3}}, "schedule: baseline: it has a job and a median; give one of them."),
        ({"baseline": {"job": 99}}, "baseline: job 99 does not exist; `shortstop list` shows those that do."),
        (
            {"webhooks": ["http://10.0.0.1/"]},
            "webhook 'http://10.0.0.1/': 10.0.0.1 is a private address; give a public",
        ),
        ({"webhooks": ["http://localhost/"]}, "webhook 'http://localhost/': 127.0.0.1 is a private address"),
        ({"webhooks": ["x"]}, "schedule: webhook 'x' is no URL; write it like https://"),
        ({"webhooks": ["https://x.org/"] * 2}, "schedule: webhooks: 'https://x.org/' is there twice; remove one."),
        ({"crom": "x"}, "schedule: field 'crom' is not known here; remove it or correct its name."),
    ],
)
def test_bad_input_is_one_sentence(
    world: World, db: Database, tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    assert complaint in refusal(db, "add", written(tmp_path, fields(world, **changes)))


def test_too_few_samples_for_any_verdict(world: World, db: Database, tmp_path: Path) -> None:
    """How many would do is said."""
    few = world.fields(benchmarks=[{**_prompts(), "jsonl": str(world.prompts), "samples": 4}])
    told = refusal(db, "add", written(tmp_path, fields(world, job=few)))
    assert "has 4 samples, too few for any verdict; at least 6, each of another source group, would do" in told


def test_a_baseline_on_other_samples(world: World, db: Database, tmp_path: Path) -> None:
    other = world.spec(benchmarks=[{**_prompts(), "jsonl": str(world.prompts), "samples": 8}], policies=["full"])
    job_id = cluster_jobs.submit(db, other)
    assert "is preparing; name one that is done" in refusal(
        db, "add", written(tmp_path, fields(world, baseline={"job": job_id}))
    )
    assert cluster_jobs.work(db, job_id, inline=True) is cluster_jobs.JobState.DONE
    told = refusal(db, "add", written(tmp_path, fields(world, baseline={"job": job_id})))
    assert told.startswith("baseline: ")
    assert f"job {job_id}" in told


def test_what_latest_is(world: World, db: Database, tmp_path: Path) -> None:
    """The newest folder that has exits, or what a link of that name points at; recorded with the firing."""
    from small_world import bundle

    folder = tmp_path / "nightly"
    spec = fields(
        world, job=world.fields(exits=str(folder / "latest"), policies=["full", {"confidence": {"threshold": 0.6}}])
    )
    folder.mkdir()
    assert f"no folder in '{folder}' has exits.json; put one there" in refusal(db, "add", written(tmp_path, spec))
    old = bundle(folder / "2026-01-01", world.model)
    assert call(db, "add", written(tmp_path, spec)).exit_code == 0
    call(db, "trigger", "nightly")
    [one] = firings.firings(db, schedules.find(db, "nightly").id)
    assert one.resolved == {"exits": str(old)}
    assert jobs.job(db, one.jobs["run"]).spec["exits"] == str(old)
    jobs.cancel_job(db, one.jobs["run"])

    new = bundle(folder / "2026-01-02", world.model)
    call(db, "trigger", "nightly")
    assert firings.firings(db, schedules.find(db, "nightly").id)[0].resolved == {"exits": str(new)}
    jobs.cancel_job(db, 2)
    (folder / "latest").symlink_to(old)
    call(db, "trigger", "nightly")
    assert firings.firings(db, schedules.find(db, "nightly").id)[0].resolved == {"exits": str(old)}
    jobs.cancel_job(db, 3)
    (folder / "latest").unlink()
    (folder / "latest").symlink_to(world.exits)
    told = refusal(db, "trigger", "nightly")
    assert "points out of its folder" in told


# --- over HTTP ------------------------------------------------------------------------------------------------


@pytest.fixture
def client(site: Site) -> Iterator[Client]:
    """Of somebody who may look and submit."""
    with Client(site.served.url, create_key(site.db, "alice", ["read", "submit"])[0]) as opened:
        yield opened


def test_a_server_does_the_same(site: Site, client: Client, tmp_path: Path) -> None:
    from cluster.schedules.spec import parse_schedule

    spec = parse_schedule(fields(site.world, name="served", webhooks=["https://hooks.example.org/x"]))
    done = client.schedules.add(spec)
    assert done.schedule.principal == "alice"
    assert done.secrets["https://hooks.example.org/x"].startswith("whsec_")
    with pytest.raises(Conflict, match="schedule 'served' is there already"):
        client.schedules.add(spec)
    one = client.schedules.trigger("served")
    assert one.state == "submitted"
    with pytest.raises(Conflict, match=r"job \d+ of it has not ended"):
        client.schedules.trigger("served")
    jobs.fail_job(site.db, one.jobs["run"], "no disk")
    tick(site.db, database_clock(site.db))  # or the server has
    shown = client.schedules.show("served")
    assert shown.firings[0].sentence == f"job {one.jobs['run']} failed: no disk"
    assert shown.incident is not None
    assert [line.schedule.name for line in client.schedules.list()] == ["served"]
    assert client.schedules.pause("served").paused
    assert not client.schedules.resume("served").paused
    assert client.schedules.resend("served") >= 0
    with Client(site.served.url, site.keys["admin"]) as admin:
        admin.schedules.remove("served")
    with pytest.raises(Missing, match="schedule 'served' does not exist"):
        client.schedules.show("served")


def test_nobody_but_an_admin_changes_the_schedules_of_others(site: Site) -> None:
    from cluster.schedules.spec import parse_schedule

    with Client(site.served.url, site.keys["admin"]) as admin:
        admin.schedules.add(parse_schedule(fields(site.world, name="theirs")))
        for method, verb in (("POST", "/pause"), ("POST", "/trigger"), ("POST", "/resend"), ("DELETE", "")):
            answer = site.ask(method, f"/v1/schedules/theirs{verb}", "submit")
            assert answer.status_code == 403
            assert "is 'admin-key''s" in answer.json()["detail"]
        assert schedules.find(site.db, "theirs").paused is False
        admin.schedules.remove("theirs")


def test_a_server_reads_only_what_it_allows(site: Site, tmp_path: Path) -> None:
    """Also where `latest` is looked up, and where a link in an allowed folder leads out of it."""
    body = fields(site.world, job=site.world.fields(exits=str(tmp_path / "latest")))
    answer = site.ask("POST", "/v1/schedules", "submit", json=body)
    assert answer.status_code == 422
    assert "is not among what this server allows" in answer.json()["detail"]
    inside = site.world.folder / "linked"
    inside.mkdir(exist_ok=True)
    if not (inside / "latest").is_symlink():
        (inside / "latest").symlink_to(tmp_path)
    body = fields(site.world, job=site.world.fields(exits=str(inside / "latest")))
    answer = site.ask("POST", "/v1/schedules", "submit", json=body)
    assert answer.status_code == 422
    assert "points out of its folder" in answer.json()["detail"]
    assert schedules.schedules(site.db) == []


def test_problems_of_the_api(site: Site, client: Client) -> None:
    relative: Any = fields(site.world, job=site.world.fields(exits="exits/latest"))
    with pytest.raises(BadInput, match="a server looks it up on its own disk; give an absolute path"):
        client.schedules.add(relative)
    answer = site.ask("POST", "/v1/schedules", "submit", json=fields(site.world, cron="0 25 * * *"))
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert answer.json()["detail"].startswith("schedule: cron '0 25 * * *': '25' is no hour")
    assert site.ask("GET", "/v1/schedules/nobody").status_code == 404
    assert site.ask("POST", "/v1/schedules/a%20b/pause").status_code == 422
