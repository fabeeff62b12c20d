"""`shortstop serve` as it comes: a job submitted over HTTP is worked on, and the workers end with the server."""

from pathlib import Path

import psutil
import pytest
from served import begin
from small_world import World, wait_for

from cluster.client import Client
from db.records import JobState


@pytest.mark.parametrize("death", ["SIGTERM", "SIGKILL"])
def test_the_server_works_on_what_is_submitted(world: World, tmp_path: Path, death: str) -> None:
    served = begin(f"sqlite:///{tmp_path / 'record.db'}", tmp_path / "up", "--allow", str(world.folder), fleet=True)
    family = psutil.Process(served.process.pid)
    try:
        with Client(served.url) as server:
            job_id = server.submit(world.spec())
            assert server.wait(job_id, timeout_s=200) is JobState.DONE
            assert len(server.completions(job_id)) == 4 * 48
        children = family.children(recursive=True)
        assert children
    finally:
        if death == "SIGTERM":
            served.end(seconds=90)
        else:
            served.kill()
    wait_for("the end of the workers", lambda: not [one for one in children if one.is_running()], 60)
