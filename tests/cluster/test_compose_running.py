"""The compose file at work without a container engine: its services, its environment, a job that goes through them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from small_world import World, wait_for

from cluster.compose.host import MARK, Host

ROOT = Path(__file__).parents[2]

#: what is up, and what is run in the fleet's place until the job has ended
SERVICES = ("fleet", "api")
WATCH = ("shortstop", "status", "1", "--watch")

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class Compose:
    """`python -m cluster.compose` with one file, one state folder and one environment."""

    file: Path
    state: Path
    environment: dict[str, str]

    def command(self, *arguments: str) -> list[str]:
        verb, *rest = arguments
        options = ["--file", str(self.file), "--state", str(self.state)]
        return [sys.executable, "-m", "cluster.compose", verb, *options, *rest]

    def up(self, *services: str) -> subprocess.Popen[str]:
        with (self.state / "up.log").open("w") as log:
            return subprocess.Popen(
                self.command("up", *services),
                env=self.environment,
                text=True,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def begun(self, service: str, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command("run", service, "--", *command),
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def answered(self, service: str, *command: str) -> str:
        process = self.begun(service, *command)
        answer, complaint = process.communicate(timeout=200)
        assert process.returncode == 0, answer + complaint + self.said()
        return answer

    def said(self) -> str:
        return (self.state / "up.log").read_text()

    def wait_until_up(self, process: subprocess.Popen[str]) -> None:
        wait_for("the services are up", lambda: "\nup;" in self.said() or process.poll() is not None, 90)
        assert process.poll() is None, self.said()

    def left(self) -> list[psutil.Process]:
        """Processes of the services that live."""
        key = Host(self.file.parent, self.state).key
        return [one for one in psutil.process_iter() if _mark(one).startswith(key)]


def _mark(process: psutil.Process) -> str:
    try:
        return process.environ().get(MARK, "")
    except psutil.Error:
        return ""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def state() -> Iterator[Path]:
    """Not pytest's own folder: as root PostgreSQL runs as a user whom that would lock out."""
    with tempfile.TemporaryDirectory(prefix="shortstop-compose-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def compose(file: Path, state: Path, **environment: str) -> Compose:
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return Compose(file, state, dict(os.environ) | {"PYTHONPATH": path} | environment)


def test_a_job_goes_through_the_services_of_the_compose_file(world: World, state: Path) -> None:
    """Submitted, worked on by Ray through PostgreSQL, reported; strangers are refused; Ctrl-C ends it all."""
    token, port = os.urandom(32).hex(), str(free_port())
    secrets = {"POSTGRES_PASSWORD": os.urandom(24).hex(), "RAY_AUTH_TOKEN": token, "HF_HUB_OFFLINE": "1"}
    project = compose(ROOT / "docker-compose.yml", state, SHORTSTOP_RAY_PORT=port, **secrets)
    spec = world.spec_file(state / "spec.yaml", policies=["full"])
    # the volume of a project that ran before, so that loops need not be compiled once more
    shutil.copytree(os.environ["SHORTSTOP_CACHE"], state / "volumes" / "state" / "cache", symlinks=True)
    up = project.up(*SERVICES)
    try:
        project.wait_until_up(up)
        assert project.answered("fleet", "shortstop", "submit", str(spec)) == "1\n"
        project.answered("fleet", *WATCH)
        report = json.loads(project.answered("api", "shortstop", "report", "1", "--json"))
        assert (report["state"], report["benchmarks"][0]["runs"][0]["summary"]["samples"]) == ("done", 48)
        check_that_ray_refuses_strangers(project, port)
        ray_folder = Host(project.file.parent, state).ray_folder
        assert ray_folder.exists()
    finally:
        up.send_signal(signal.SIGINT)
        assert up.wait(120) == 0, project.said()
    assert project.left() == []
    assert not ray_folder.exists()
    assert (state / "volumes" / "record" / "data" / "PG_VERSION").exists()


def check_that_ray_refuses_strangers(project: Compose, port: str) -> None:
    """Who has no token, or another one, does not get in; the same words with the token do."""
    knock = f"import ray; ray.init('ray-head:{port}', logging_level=40); print('in with', len(ray.nodes()))"
    token = f"RAY_AUTH_TOKEN={project.environment['RAY_AUTH_TOKEN']}"
    knocking = [
        (welcome, project.begun("ray-worker", "env", *who, "RAY_py_gcs_connect_timeout_s=3", "python", "-c", knock))
        for who, welcome in (
            ([token], True),
            ([f"RAY_AUTH_TOKEN={'0' * 64}"], False),
            (["-u", "RAY_AUTH_TOKEN", "-u", "RAY_AUTH_MODE"], False),
        )
    ]
    for welcome, one in knocking:
        said, why = one.communicate(timeout=200)
        assert (one.returncode == 0, "in with" in said) == (welcome, welcome), said + why


_SMALL = """
services:
  first:
    image: x
    command: sh -c 'sleep 0.3; echo made > /shared/made; {first}'
    volumes: ["shared:/shared"]
  second:
    image: x
    command: >-
      sh -c 'trap "cp /shared/made /shared/ended; exit 0" TERM; sleep 0.5; touch /shared/well;
      while true; do sleep 0.1; done'
    volumes: ["shared:/shared"]
    depends_on: {{first: {{condition: service_completed_successfully}}}}
    healthcheck: {{test: [CMD, test, -e, /shared/well], interval: 1s, start_period: 20s}}
  third:
    image: x
    command: sh -c 'test -e /shared/well && echo again >> /shared/third; sleep {third}; exit 3'
    restart: {restart}
    volumes: ["shared:/shared"]
    depends_on: {{second: {{condition: service_healthy}}}}
"""


def small(state: Path, *, first: str = "true", third: str = "60", restart: str = "always") -> tuple[Compose, Path]:
    file = state / "compose.yml"
    file.write_text(_SMALL.format(first=first, third=third, restart=restart))
    return compose(file, state), state / "volumes" / "shared"


def ended(project: Compose, up: subprocess.Popen[str], signum: int) -> None:
    up.send_signal(signum)
    assert up.wait(60) == 0, project.said()
    assert project.left() == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_service_starts_when_what_it_waits_for_is_there_and_is_asked_before_it_is_killed(
    state: Path, signum: int
) -> None:
    project, shared = small(state)
    up = project.up()
    project.wait_until_up(up)
    wait_for("the third", (shared / "third").exists)
    lines = project.said().splitlines()
    assert [line.split()[0] for line in lines if "starts at" in line] == ["first", "second", "third"]
    ended(project, up, signum)
    assert (shared / "ended").exists()


def test_a_service_that_ends_is_started_again(state: Path) -> None:
    project, shared = small(state, third="0.1")
    up = project.up()
    wait_for(
        "the third start", lambda: (shared / "third").exists() and len((shared / "third").read_text().split()) >= 3
    )
    ended(project, up, signal.SIGINT)


@pytest.mark.parametrize("first", ["exit 5", "no-such-command"])
def test_a_service_that_others_wait_for_and_that_fails_ends_it_all(state: Path, first: str) -> None:
    project, shared = small(state, first=first)
    up = project.up()
    assert up.wait(60) == 1
    code = 5 if first == "exit 5" else 127
    assert f"compose: service first ended with code {code}; what it said stands above." in project.said()
    assert project.left() == []
    assert not (shared / "third").exists()


def test_two_do_not_start_the_same_services(state: Path) -> None:
    project, _ = small(state)
    up = project.up()
    project.wait_until_up(up)
    second = subprocess.run(project.command("up"), env=project.environment, text=True, capture_output=True)
    assert second.returncode == 2
    assert "are up already" in second.stderr
    assert project.left()
    ended(project, up, signal.SIGINT)


def test_what_a_killed_up_left_is_ended_by_the_next(state: Path) -> None:
    project, _ = small(state)
    up = project.up()
    project.wait_until_up(up)
    up.kill()
    up.wait()
    left = project.left()
    assert left
    again = project.up()
    wait_for("the old ones are gone", lambda: not any(one.is_running() for one in left))
    project.wait_until_up(again)
    ended(project, again, signal.SIGINT)


def test_down_ends_what_a_killed_up_left(state: Path) -> None:
    project, _ = small(state)
    up = project.up()
    project.wait_until_up(up)
    up.kill()
    up.wait()
    assert project.left()
    subprocess.run(project.command("down"), env=project.environment, check=True)
    assert project.left() == []


def test_bad_input_is_one_sentence(state: Path) -> None:
    project, _ = small(state)
    for arguments, complaint in (
        (("up", "secnd"), "did you mean 'second'"),
        (("run", "forth", "true"), "unknown service 'forth'"),
    ):
        done = subprocess.run(project.command(*arguments), env=project.environment, text=True, capture_output=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert complaint in done.stderr.splitlines()[-1]
        assert len(done.stderr.splitlines()) == 1
