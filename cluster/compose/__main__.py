"""`python -m cluster.compose up`: the services of a compose file as processes of this machine."""

import os
import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from dotenv import dotenv_values
from filelock import FileLock, Timeout

import db.errors
from cluster.compose.file import chosen, read_compose
from cluster.compose.host import MARK, Host, Process
from cluster.compose.running import Project, ServiceFailed, end_all, say
from engine.errors import BadInput

app = typer.Typer(
    help="The services of docker-compose.yml without a container engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
File = Annotated[Path, typer.Option("--file", "-f", metavar="FILE", help="The compose file.")]
State = Annotated[
    Path | None,
    typer.Option("--state", metavar="FOLDER", help="Where volumes are kept; build/compose beside the file if absent."),
]
_FILE = Path("docker-compose.yml")


@app.command()
def up(
    services: Annotated[
        list[str] | None, typer.Argument(metavar="SERVICE", help="These, and what they wait for; all if absent.")
    ] = None,
    file: File = _FILE,
    state: State = None,
    profile: Annotated[list[str] | None, typer.Option("--profile", help="Services of this profile too.")] = None,
) -> None:
    """Start services and look after them until Ctrl-C."""
    host, processes = _settled(file, state)
    everything = read_compose(file, _variables(file))
    wanted = [one.name for one in chosen(everything, services or [], profile or [])]
    host.state.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with FileLock(host.state / "up.lock", timeout=0):
            _watch(Project(host, {name: processes[name] for name in wanted}))
    except Timeout:
        raise BadInput(f"the services of {str(host.state)!r} are up already; give another --state.") from None
    finally:
        shutil.rmtree(host.ray_folder, ignore_errors=True)


def _watch(project: Project) -> None:
    told = False
    try:
        with project:
            for _ in project.watch():
                if project.up and not told:
                    say("up; Ctrl-C ends it")
                    told = True
    except KeyboardInterrupt:
        return


@app.command()
def run(
    service: Annotated[str, typer.Argument(metavar="SERVICE")],
    command: Annotated[list[str], typer.Argument(metavar="COMMAND…")],
    file: File = _FILE,
    state: State = None,
) -> None:
    """Run one command as a service would: with its environment, in its place. The services may be up or not."""
    _, processes = _settled(file, state)
    if service not in processes:
        chosen(read_compose(file, _variables(file)), [service], [])  # says so
    process = processes[service]
    process.prepare()
    os.chdir(process.folder)
    # no part of the service: it does not end with it
    environment = {name: value for name, value in process.environment.items() if name != MARK}
    words = [process.inside.outside(word) for word in command]
    os.execvpe(words[0], words, environment)


@app.command()
def down(file: File = _FILE, state: State = None) -> None:
    """End what an `up` left behind that was killed."""
    host, _ = _settled(file, state)
    end_all(host.owns)
    shutil.rmtree(host.ray_folder, ignore_errors=True)


def _settled(file: Path, state: Path | None) -> tuple[Host, dict[str, Process]]:
    project = file.absolute().parent
    host = Host(project, (state or project / "build" / "compose").absolute())
    return host, host.settled(read_compose(file, _variables(file)).values())


def _variables(file: Path) -> dict[str, str]:
    beside = dotenv_values(file.absolute().parent / ".env")
    return {name: value for name, value in beside.items() if value is not None} | dict(os.environ)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Exit codes as `shortstop` has them."""
    try:
        app()
    except (BadInput, db.errors.BadInput) as error:
        say(f"compose: {error}")
        raise SystemExit(2) from None
    except ServiceFailed as error:
        say(f"compose: {error}")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
