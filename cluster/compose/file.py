"""Reading a compose file: what it says of services, variables filled in. What the host cannot honour is refused."""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from engine.errors import BadInput
from engine.registry import unknown

#: about images and isolation: a process on the host has neither
_OF_CONTAINERS = {
    "build", "cap_drop", "deploy", "init", "ports", "security_opt", "shm_size", "user",
}  # fmt: skip
_HONOURED = {
    "command", "depends_on", "environment", "healthcheck", "image", "profiles", "restart", "stop_grace_period",
    "stop_signal", "volumes",
}  # fmt: skip
_HEALTH = {"test", "interval", "timeout", "retries", "start_period"}
_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|(?P<plain>\w+)|\{(?P<name>\w+)(?:(?P<how>:?[-?])(?P<word>[^{}]*))?\})")
_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


class Condition(StrEnum):
    """What a service waits for in another."""

    STARTED = "service_started"
    HEALTHY = "service_healthy"
    COMPLETED = "service_completed_successfully"


@dataclass(frozen=True)
class Health:
    """A command that says whether a service is well."""

    command: tuple[str, ...]
    interval: float
    timeout: float
    retries: int
    start_period: float


@dataclass(frozen=True)
class Service:
    """One service, as the file has it."""

    name: str
    image: str
    command: tuple[str, ...]  #: empty: the image's own
    environment: dict[str, str]
    depends_on: dict[str, Condition]
    health: Health | None
    volumes: dict[str, str]  #: path in the container -> folder of the host, or the name of a volume
    restarts: bool
    stop_signal: str
    grace_seconds: float
    profiles: frozenset[str]


def read_compose(path: Path, environment: Mapping[str, str]) -> dict[str, Service]:
    """The file's services by name, with variables from `environment`. Raises `BadInput`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        services = content["services"]
        parts = {name: dict(fields) for name, fields in services.items()}
    except OSError as error:
        raise BadInput(f"compose file {str(path)!r} cannot be read ({error.strerror}); give another one.") from None
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):
        raise BadInput(f"compose file {str(path)!r} has no services; give a file of the compose format.") from None
    found = {name: _service(name, fields, environment) for name, fields in parts.items()}
    for service in found.values():
        for other in service.depends_on:
            if other not in found:
                raise BadInput(f"service {service.name!r} depends on {unknown('service', other, list(found))}")
    return found


def chosen(services: dict[str, Service], names: list[str], profiles: list[str]) -> list[Service]:
    """The services of these names, or all that these profiles allow, and what they depend on, which comes first.

    Raises `BadInput` for an unknown name or services that wait for each other.
    """
    for name in names:
        if name not in services:
            raise BadInput(f"{unknown('service', name, list(services))}")
    wanted = names or [name for name, one in services.items() if not one.profiles or one.profiles & set(profiles)]
    names_in_order = dict.fromkeys(found for name in wanted for found in _with_dependencies(services, name, ()))
    return [services[name] for name in names_in_order]


def _with_dependencies(services: dict[str, Service], name: str, above: tuple[str, ...]) -> Iterator[str]:
    if name in above:
        raise BadInput(f"services {', '.join(above)} wait for each other; correct depends_on.")
    for other in services[name].depends_on:
        yield from _with_dependencies(services, other, (*above, name))
    yield name


def _service(name: str, raw: dict[str, Any], environment: Mapping[str, str]) -> Service:
    # the rest is not looked at: a variable that only the image needs may be missing
    honoured = {key: value for key, value in raw.items() if key not in _OF_CONTAINERS}
    fields = _interpolated(honoured, environment, f"service {name!r}")
    for key in fields:
        if key not in _HONOURED:
            raise BadInput(f"service {name!r}: {key} cannot be honoured without a container engine; leave it out.")
    return Service(
        name=name,
        image=str(fields.get("image", "")),
        command=_words(fields.get("command")),
        environment=_environment(fields.get("environment")),
        depends_on=_dependencies(name, fields.get("depends_on")),
        health=_health(name, fields.get("healthcheck")),
        volumes=dict(_volume(name, entry) for entry in fields.get("volumes", [])),
        restarts=fields.get("restart", "no") in ("always", "unless-stopped", "on-failure"),
        stop_signal=fields.get("stop_signal", "SIGTERM"),
        grace_seconds=_seconds(name, fields.get("stop_grace_period", "10s")),
        profiles=frozenset(fields.get("profiles", ())),
    )


def _interpolated(value: Any, environment: Mapping[str, str], where: str) -> Any:
    """The value with ${VARIABLE}, ${VARIABLE:-default} and ${VARIABLE:?message} filled in, however deep."""
    if isinstance(value, dict):
        return {key: _interpolated(part, environment, where) for key, part in value.items()}
    if isinstance(value, list):
        return [_interpolated(part, environment, where) for part in value]
    if not isinstance(value, str):
        return value

    def filled(found: re.Match[str]) -> str:
        if found["dollar"]:
            return "$"
        name, how, word = found["plain"] or found["name"], found["how"] or "", found["word"] or ""
        given = environment.get(name)
        missing = given is None or (how.startswith(":") and not given)
        if missing and how.endswith("?"):
            raise BadInput(f"{where}: the variable {name} is missing; {word or 'set it'}.")
        return word if missing else str(given)

    return _VARIABLE.sub(filled, value)


def _words(command: str | list[Any] | None) -> tuple[str, ...]:
    return tuple(shlex.split(command) if isinstance(command, str) else map(str, command or ()))


def _environment(given: dict[str, Any] | list[str] | None) -> dict[str, str]:
    pairs = [entry.partition("=")[::2] for entry in given] if isinstance(given, list) else (given or {}).items()
    return {name: "" if value is None else str(value) for name, value in pairs}


def _dependencies(name: str, given: dict[str, Any] | list[str] | None) -> dict[str, Condition]:
    if isinstance(given, list):
        return dict.fromkeys(given, Condition.STARTED)
    try:
        return {other: Condition(how["condition"]) for other, how in (given or {}).items()}
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"service {name!r}: depends_on needs a condition of {', '.join(Condition)}.") from None


def _health(name: str, given: dict[str, Any] | None) -> Health | None:
    if given is None:
        return None
    test = given.get("test", [])
    if isinstance(test, str) or test[:1] == ["CMD-SHELL"]:
        command: tuple[str, ...] = ("sh", "-c", test if isinstance(test, str) else test[1])
    else:
        command = tuple(map(str, test[1:]))
    if not command or set(given) - _HEALTH:
        raise BadInput(f"service {name!r}: a healthcheck has a test, and of {', '.join(sorted(_HEALTH))} no more.")
    return Health(
        command=command,
        interval=_seconds(name, given.get("interval", "30s")),
        timeout=_seconds(name, given.get("timeout", "30s")),
        retries=int(given.get("retries", 3)),
        start_period=_seconds(name, given.get("start_period", "0s")),
    )


def _volume(name: str, entry: Any) -> tuple[str, str]:
    parts = entry.split(":") if isinstance(entry, str) else []
    if len(parts) not in (2, 3):
        raise BadInput(f"service {name!r}: volume {entry!r} is not written like name:/path or ./folder:/path:ro.")
    return parts[1], parts[0]


def _seconds(name: str, duration: str) -> float:
    found = _DURATION.fullmatch(str(duration))
    if found is None or not str(duration):
        raise BadInput(f"service {name!r}: {duration!r} is no duration; write it like 90s or 1m30s.")
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(hours * 3600 + minutes * 60 + seconds)
