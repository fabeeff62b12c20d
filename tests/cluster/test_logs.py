"""Logs that a machine reads: one JSON object a line, which says whose line it is."""

import json
import logging
import socket
import subprocess
import sys
from typing import Any

import pytest
import structlog
from small_world import World

from cluster import jobs
from cluster.logs import configure_logs
from db import jobs as record
from db import queue
from db.session import Database

_SPEAKING = """
import logging, structlog
from cluster.logs import configure_logs
configure_logs("info")
configure_logs("info")  # once more changes nothing
log = structlog.get_logger()
log.info("two\\nlines", n=1)
log.debug("not asked for")
try:
    1 / 0
except ZeroDivisionError:
    log.error("failed", exc_info=True)
    logging.getLogger("lib.part").exception("it %s", "broke", extra={"size": 3})
logging.getLogger("lib").info("chatter")
"""


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_every_event_is_one_json_line_libraries_included() -> None:
    done = subprocess.run([sys.executable, "-c", _SPEAKING], capture_output=True, text=True, check=True)
    first, second, third = lines(done.stderr)
    assert (first["event"], first["level"], first["n"]) == ("two\nlines", "info", 1)
    assert (second["event"], second["exception"][0]["exc_type"]) == ("failed", "ZeroDivisionError")
    assert (third["event"], third["level"], third["logger"], third["size"]) == ("it broke", "error", "lib.part", 3)
    assert third["exception"][0]["exc_type"] == "ZeroDivisionError"
    assert all(one["timestamp"].startswith("20") for one in (first, second, third))


def test_a_workers_lines_say_job_shard_epoch_worker_and_node(
    world: World, db: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    """Red without `at_work`."""
    job_id = jobs.submit(db, world.spec(policies=["full"], shard_batches=6))
    jobs.prepare(db, queue.claim(db, "test", kind="prepare"))
    before = structlog.get_config()
    try:
        configure_logs("info")
        assert jobs.work(db, job_id, inline=True) is record.JobState.DONE
    finally:
        structlog.configure(**before)
    committed = [one for one in lines(capsys.readouterr().err) if one["event"] == "shard committed"]
    assert [(one["job"], one["epoch"], one["node"]) for one in committed] == [(job_id, 1, socket.gethostname())] * 2
    assert len({one["shard"] for one in committed}) == 2
    assert all(one["worker"].startswith(socket.gethostname()) for one in committed)
    assert structlog.contextvars.get_contextvars() == {}


def test_standard_error_may_be_another_later(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs()
    capsys.readouterr()
    logging.getLogger("lib").warning("late")
    assert lines(capsys.readouterr().err)[0]["event"] == "late"
