"""A server has room for so many who listen, and says so to the next one."""

import pytest
from starlette.testclient import TestClient

from cluster.api import watching
from cluster.api.app import make_app
from cluster.pages import live
from cluster.settings import load_settings
from db import jobs
from db.session import Database


@pytest.mark.parametrize(("room", "path"), [("MOST_LISTENERS", "/v1/jobs/1/events"), ("MOST_STREAMS", "/live")])
def test_one_more_listener_is_told_to_come_later(
    db: Database, monkeypatch: pytest.MonkeyPatch, room: str, path: str
) -> None:
    jobs.create_job(db, name="watched", spec={"model": "m"})
    monkeypatch.setattr(watching if room == "MOST_LISTENERS" else live, room, 0)
    app = make_app(db, load_settings(database_url=db.url), is_loopback=True)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        answer = client.get(path)
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:shortstop:problem:unavailable")
        assert "streams are open; try again later" in answer.json()["detail"]
        assert client.get("/readyz").status_code == 200
