"""`shortstop status` tells what the record knows: jobs, workers, nodes, throughput, time left."""

import json
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from made import claimed, planned_job, results_of, summarise, work
from rich.console import Console
from sqlalchemy import text
from typer.testing import CliRunner

from cluster import status
from cluster.cli import app
from cluster.cli.status import _tables
from cluster.status import Watcher, node_of
from db import events, jobs, queue, results
from db.session import Database


def call(db: Database, *arguments: object) -> Any:
    return CliRunner().invoke(app, ["status", *(str(argument) for argument in arguments), "--database", db.url])


def commit(db: Database, worker: str) -> None:
    lease = claimed(db, worker)
    results.commit_shard(db, lease, results_of(db, lease))


def begun(db: Database, seconds_ago: float) -> None:
    with db.write() as connection:
        connection.execute(text(f"UPDATE job SET started_at = started_at - {seconds_ago}"))


@pytest.mark.parametrize(
    ("worker", "node"),
    [
        ("gpu-7.example-4711-0a1b2c-12", "gpu-7.example"),
        ("laptop-alone-4711-0a1b2c", "laptop"),
        ("a1b2c3-4@gpu-7.example", "gpu-7.example"),
        ("worker", "worker"),
    ],
)
def test_a_workers_name_tells_its_node(worker: str, node: str) -> None:
    assert node_of(worker) == node


def test_workers_and_nodes_are_those_that_hold_or_wait(db: Database) -> None:
    job_id = planned_job(db, 12)
    lease, _ = claimed(db, "1@north"), claimed(db, "2@north")
    queue.renew(db, lease, 1)
    claimed(db, "3@south")
    assert queue.claim(db, "4@south", kind="shard") is None
    with db.write() as connection:
        connection.execute(text("UPDATE task SET lease_until = lease_until - 60 WHERE worker = '3@south'"))
    now = Watcher(db).look()
    assert [(one.worker, one.node, one.state, one.batches_done) for one in now.workers] == [
        ("1@north", "north", "evaluating", 1),
        ("2@north", "north", "evaluating", 0),
        ("3@south", "south", "silent", 0),
        ("4@south", "south", "idle", 0),
    ]
    assert now.nodes == {"north": 2, "south": 2}
    assert (now.jobs[0].job, now.jobs[0].workers, now.jobs[0].batches_done) == (job_id, 3, 1)
    assert now.workers[0].shard == lease.task_id


def test_the_rate_is_that_of_the_last_minute_and_the_time_left_follows(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 20 batches 2 were done in the first 1,000 s, then 4 in 10 s: 14 take 35 s, not 2,000."""
    planned_job(db, 40)
    commit(db, "a")
    begun(db, 1000)
    at = 5000.0
    monkeypatch.setattr(status.time, "monotonic", lambda: at)
    watcher = Watcher(db)
    [first] = watcher.look().jobs
    assert first.batches_per_second == pytest.approx(0.002, rel=0.05)
    assert first.seconds_left == pytest.approx(9000, rel=0.05)
    tokens = watcher._courses[first.job].shards.tokens
    commit(db, "a")
    commit(db, "a")
    at += 10
    [second] = watcher.look().jobs
    assert (second.batches_done, second.batches_per_second, second.seconds_left) == (6, 0.4, 35)
    more = watcher._courses[first.job].shards.tokens - tokens
    assert second.tokens_per_second == pytest.approx(more / 10)
    for _ in range(30):
        at += 10
        [late] = watcher.look().jobs
    assert (late.batches_per_second, late.seconds_left) == (0, None)
    jobs.pause_job(db, first.job)
    [paused] = watcher.look().jobs
    assert (paused.paused, paused.seconds_left, paused.tokens_per_second) == (True, None, None)


def test_plain_lines_and_json(db: Database) -> None:
    assert call(db).stdout == "no worker is at work\n"
    planned_job(db, 12)
    commit(db, "1@north")
    claimed(db, "2@north")
    begun(db, 1000)
    line, workers = call(db).stdout.splitlines()
    told = r"job 1 made: running, 2 of 6 batches, 2 errors, 1 worker, 0 tokens/s, (33 min \d+ s) left"
    assert re.fullmatch(told.replace("2 errors, ", r"(\d+ errors, )?"), line), line
    assert workers == "1 worker: 1 on north"
    found = json.loads(call(db, "--json").stdout)
    assert found["jobs"][0]["batches_total"] == 6
    assert found["workers"][0] | {"lease_seconds": 0} == {
        "worker": "2@north", "node": "north", "state": "evaluating", "job": 1, "shard": found["workers"][0]["shard"],
        "batches_done": 0, "batches": 2, "attempt": 1, "lease_seconds": 0,
    }  # fmt: skip


@pytest.mark.parametrize("as_json", [False, True])
def test_watching_ends_with_the_job(db: Database, as_json: bool) -> None:
    job_id = planned_job(db, 8)
    watched: list[Any] = []
    options = ["--watch", "--every", "0.1", *(["--json"] if as_json else [])]
    watching = threading.Thread(target=lambda: watched.append(call(db, job_id, *options)))
    watching.start()
    work(db)
    results.finalise(db, job_id, summarise)
    watching.join(60)
    [done] = watched
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    if as_json:
        assert [json.loads(line)["jobs"][0]["job"] for line in lines] == [job_id] * len(lines)
        assert json.loads(lines[-1])["jobs"][0]["state"] == "done"
    else:
        assert "job 1 made: done, 4 of 4 batches" in "\n".join(lines)


def test_bad_input_is_one_sentence(db: Database) -> None:
    for arguments, complaint in (((7,), "job 7 does not exist"), (("--every", "0"), "--every 0 is not between")):
        done = call(db, *arguments)
        assert (done.exit_code, done.stdout) == (2, "")
        [line] = done.stderr.splitlines()
        assert complaint in line


def test_tables_say_what_is_known_and_no_more(db: Database) -> None:
    planned_job(db, 8)
    jobs.create_job(db, name="[red]new[/red]", spec={"model": "none"})
    claimed(db, "1@north")
    assert queue.claim(db, "p@south", kind="prepare") is not None
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(_tables(Watcher(db).look()))
    console.file.close()
    shown = console.export_text()
    assert re.search(r"2\s+\[red\]new\[/red\]\s+preparing\s+1", shown)
    assert re.search(r"1@north\s+north\s+evaluating\s+1\s+\d+\s+0 of 2\s+1", shown)
    assert re.search(r"p@south\s+south\s+preparing\s+2\s+1", shown)
    assert "None" not in shown


def test_on_a_terminal_it_stays_in_place(db: Database) -> None:
    """A real terminal: cursor movements, and what was known at the last look."""
    job_id = planned_job(db, 4)
    work(db)
    results.finalise(db, job_id, summarise)
    main, terminal = pty.openpty()
    command = [str(Path(sys.executable).parent / "shortstop"), "status", str(job_id), "--watch", "--database", db.url]
    process = subprocess.Popen(command, stdout=terminal, env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"})
    os.close(terminal)
    said = b""
    try:
        while piece := os.read(main, 4096):
            said += piece
    except OSError:  # the other end is closed
        pass
    assert process.wait(60) == 0
    os.close(main)
    assert b"\x1b[" in said
    assert b"2 of 2" in said


# --- what happened ---------------------------------------------------------------------------------------------------


def logs(db: Database, *arguments: object) -> Any:
    return CliRunner().invoke(app, ["logs", *(str(argument) for argument in arguments), "--database", db.url])


def test_what_happened_is_a_line_each(db: Database) -> None:
    job_id = planned_job(db, 8)
    for _ in range(queue.MAX_ATTEMPTS):
        claimed(db, "a@\x1b[31mnorth")
        queue.reap(db, dead_workers=["a@\x1b[31mnorth"])
    told = logs(db, job_id)
    assert told.exit_code == 0, told.output
    lines = told.stdout.splitlines()
    assert len(lines) == len(events.events(db, job_id))
    assert [line.split("  ")[1] for line in lines[:3]] == ["submitted", "planned", "started"]
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC  submitted  local", lines[0])
    assert "shard dead  a@�[31mnorth  task=" in lines[-1]
    found = [json.loads(line) for line in logs(db, job_id, "--json").stdout.splitlines()]
    assert [one["what"] for one in found] == [event.what for event in events.events(db, job_id)]
    gone = logs(db, job_id + 1)
    assert (gone.exit_code, gone.stdout, len(gone.stderr.splitlines())) == (2, "", 1)


def test_following_ends_with_the_job_and_tells_its_end(db: Database) -> None:
    job_id = planned_job(db, 8)
    followed: list[Any] = []
    following = threading.Thread(target=lambda: followed.append(logs(db, job_id, "-f")))
    following.start()
    jobs.pause_job(db, job_id)
    jobs.cancel_job(db, job_id)
    following.join(60)
    [done] = followed
    assert done.exit_code == 0, done.output
    assert [line.split("  ")[1] for line in done.stdout.splitlines()] == ["submitted", "planned", "paused", "cancelled"]


def test_looks_at_one_job_and_at_all_share_what_was_seen(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server has one watcher for whoever asks."""
    job_id = planned_job(db, 40)
    commit(db, "a")
    begun(db, 1000)
    at = 5000.0
    monkeypatch.setattr(status.time, "monotonic", lambda: at)
    watcher = Watcher(db)
    watcher.look(job_id)
    commit(db, "a")
    at += 10
    assert watcher.look().jobs[0].batches_per_second == pytest.approx(0.2)
    jobs.cancel_job(db, job_id)
    assert [one.state for one in watcher.look(job_id).jobs] == ["cancelled"]
    assert watcher.look().jobs == []
    assert watcher._courses == {}, "a server would remember every job that anybody ever asked for"
