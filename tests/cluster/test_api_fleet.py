"""`shortstop serve` as it comes: a job submitted over HTTP is worked on, and the workers end with the server."""

from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from served import begin
from small_world import World, rows, wait_for
from structlog.testing import capture_logs

from cluster.api import fleet as module
from cluster.client import Client
from cluster.fleet.keeper import Keeper
from cluster.settings import load_settings
from db.records import JobState
from db.session import open_database
from engine.errors import BadInput


@pytest.mark.parametrize("death", ["SIGTERM", "SIGKILL"])
def test_the_server_works_on_what_is_submitted(world: World, tmp_path: Path, death: str) -> None:
    url, options = f"sqlite:///{tmp_path / 'record.db'}", ("--allow", str(world.folder), "--workers", "1")
    served = begin(url, tmp_path / "up", *options, fleet=True)
    family = psutil.Process(served.process.pid)
    try:
        with Client(served.url) as server:
            job_id = server.submit(world.spec())
            assert server.wait(job_id, timeout_s=200) is JobState.DONE
            assert len(server.completions(job_id)) == 4 * 48
            with closing(open_database(url)) as db:
                workers = rows(db, "select count(distinct worker) from task where kind = 'shard' and state = 'done'")
                assert workers == [(1,)], "as many as it was told, though there is room for more"
        children = family.children(recursive=True)
        assert children
    finally:
        if death == "SIGTERM":
            served.end(seconds=90)
        else:
            served.kill()
    wait_for("the end of the workers", lambda: not [one for one in children if one.is_running()], 60)


def test_a_server_whose_ray_is_not_there_yet_tries_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have started before the head. Red where the first refusal is the last word."""
    tries: list[str] = []

    def run(self: Keeper, **_: Any) -> None:
        tries.append(self.who)
        if len(tries) < 3:
            raise BadInput("Ray at '10.0.0.1:6379' cannot be reached.")
        self.rest(60)

    monkeypatch.setattr(Keeper, "run", run)
    monkeypatch.setattr(module, "AGAIN_SECONDS", 0.05)
    settings = load_settings(database_url=f"sqlite:///{tmp_path / 'record.db'}")
    with capture_logs() as logs:
        with module.fleet(settings):
            wait_for("the third try", lambda: len(tries) == 3, 20)
        assert [entry["event"] for entry in logs] == ["the server has no workers"] * 2
