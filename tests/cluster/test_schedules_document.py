"""docs/schedules.md is true: its file is a schedule, its commands and its Python run, its message is what is sent."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from served import serving

from cluster.schedules.spec import parse_schedule
from cluster.schedules.webhooks import signature
from db import firings, incidents, schedules
from db.keys import create_key
from db.schedules import Verdict, Wish
from db.session import Database, open_database
from engine.exits import find_bundle

pytestmark = pytest.mark.slow

TEXT = (Path(__file__).parents[2] / "docs" / "schedules.md").read_text()


def block(language: str) -> str:
    [found] = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    return str(found)


def documented(folder: Path) -> dict[str, Any]:
    """The schedule of the document, its exits in this folder and with fewer samples."""
    shutil.copytree(find_bundle("smollm2-135m"), folder / "exits" / "2026-01-01")
    value = yaml.safe_load(block("yaml"))
    value["job"]["exits"] = str(folder / "exits" / "latest")
    value["job"]["benchmarks"][0]["samples"] = 8
    return value


@pytest.mark.timeout(900)
def test_commands_and_python_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHORTSTOP_CACHE")  # the converted model lies in the user's cache
    value = documented(tmp_path)
    (tmp_path / "nightly.yaml").write_text(yaml.safe_dump(value))
    url = f"sqlite:///{tmp_path / 'record.db'}"
    environment = os.environ | {"SHORTSTOP_DATABASE_URL": url, "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def run(command: str) -> str:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    commands = [line.split("  #")[0].strip() for line in block("sh").splitlines()]
    assert len(commands) == 9
    said = {command.split()[2]: run(command) for command in commands}
    assert said["add"].startswith("schedule nightly: fires next on ")
    assert "job 1 submitted" in said["trigger"]
    assert "removed" in said["remove"]

    with closing(open_database(url)) as db:
        key = create_key(db, "alice", ["read", "submit"])[0]
    with serving(url, tmp_path / "uploads", "--allow", str(tmp_path)) as served:
        code = block("python").replace("https://shortstop.example.org", served.url).replace('key="…"', f"key={key!r}")
        code = code.replace('"job": {...}', f'"job": {value["job"]!r}')
        code = code.replace(
            "    client.schedules.show", "    client.schedules.trigger('nightly')\n    client.schedules.show"
        )
        run(f"{sys.executable} - <<'END'\n{code}END")


def test_the_message_is_as_documented(sqlite_db: Database) -> None:
    shown = json.loads(block("json"))
    secret = incidents.new_secret()
    row = schedules.add(
        sqlite_db, "x", {}, overlap="skip", next_at=None, principal="a", at=1e9, webhooks=[("https://x.org", secret)]
    )
    one = firings.trigger(sqlite_db, row, Wish("x", {}), 1e9)
    changes = [{"what": "exits_hash", "before": "a", "after": "b"}]
    firings.settle(sqlite_db, row, one, Verdict.FAIL, "worse", at=1e9, changed=changes)
    [told] = incidents.messages(sqlite_db, row.id)
    sent = json.loads(told.body)
    assert set(sent) == set(shown)
    assert set(sent["data"]) == set(shown["data"])
    assert set(sent["data"]["changed"][0]) == set(shown["data"]["changed"][0])
    assert signature(secret, "msg", 1, told.body).startswith("v1,")


def test_the_file_is_a_schedule() -> None:
    spec = parse_schedule(yaml.safe_load(block("yaml")))
    assert parse_schedule(spec.dump()) == spec
    assert spec.gate is not None
    assert len(spec.gate.rules) == 2
