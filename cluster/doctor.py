"""What this machine has and what is missing, with the command to get it."""

import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import db.errors
import engine.errors
from cluster.settings import Settings

_PACKAGES = ("torch", "transformers", "ray", "SQLAlchemy")
#: what `pytest -m gpu` checks and nobody has run
_NOT_RUN_ON_A_GPU = "the engine, its timing by events, its kernels, torch.compile, and memory with `batch_size: auto`"
_GPU_TESTS = "pytest -m gpu"


class Finding(StrEnum):
    """How a check came out."""

    OK = "ok"
    NOTE = "note"  #: nothing is wrong; worth knowing
    MISSING = "missing"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    finding: Finding
    detail: str
    remedy: str | None = None  #: the command that helps


def examine(settings: Settings) -> Iterator[Check]:
    """Look at everything a job needs. Models known by name are located, which converts what was never used before."""
    yield Check("python", Finding.OK, f"{platform.python_version()} on {platform.system()}, {sys.executable}")
    yield _processor()
    yield _memory()
    packages = [_package(name) for name in _PACKAGES]
    yield from packages
    if any(package.finding is Finding.MISSING for package in packages):
        return  # the rest could not even be looked at
    yield from _devices()
    yield _loops()
    yield _postgresql_driver()
    yield from _models()
    yield from _benchmarks()
    yield _exits()
    yield _database(settings)


def _processor() -> Check:
    import psutil

    threads = psutil.cpu_count()
    return Check(
        "cpu",
        Finding.OK,
        f"{platform.machine()}, {psutil.cpu_count(logical=False) or threads} cores, {threads} threads",
    )


def _memory() -> Check:
    import psutil

    from engine.memory import free_main_memory

    total = psutil.virtual_memory().total
    return Check("memory", Finding.OK, f"{_gib(total)}, {_gib(free_main_memory())} free")


def _package(name: str) -> Check:
    try:
        return Check(name, Finding.OK, version(name))
    except PackageNotFoundError:
        return Check(name, Finding.MISSING, "is not installed", f"pip install {name}")


def _devices() -> Iterator[Check]:
    from cluster.prepare import cores
    from engine.device import describe_device_class, find_device
    from engine.memory import free_memory

    device = find_device("auto")
    has_gpu = device.type == "cuda"
    found = f"yes, {_gib(free_memory(device))} free" if has_gpu else "no"
    detail = f"{found}; not run on a GPU yet: {_NOT_RUN_ON_A_GPU}; where there is one, `{_GPU_TESTS}` runs them"
    yield Check("gpu", Finding.NOTE, detail, _GPU_TESTS if has_gpu else None)
    yield Check("device class", Finding.OK, describe_device_class(device, "float32", cores()))


def _loops() -> Check:
    from engine import openmp

    if openmp.available():
        return Check("cpu loops", Finding.OK, "compiled, on PyTorch's threads")
    detail = "compiled, but this PyTorch has other threads than OpenMP's: they run in one thread"
    return Check("cpu loops", Finding.NOTE, detail, "use a PyTorch wheel for Linux from PyPI")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _postgresql_driver() -> Check:
    if find_spec("psycopg"):
        return Check("postgresql driver", Finding.OK, f"psycopg {version('psycopg')}")
    return Check(
        "postgresql driver", Finding.NOTE, "not installed; SQLite needs none", "pip install 'shortstop[postgres]'"
    )


def _models() -> Iterator[Check]:
    from engine.loading import models

    def located(name: str) -> str:
        return str(models[name].locate())

    yield from (_tried("model", name, located) for name in models)


def _benchmarks() -> Iterator[Check]:
    """Data that people fetch themselves may lack; nothing is fetched here."""
    from workers.benchmarks.catalogue import benchmarks

    def counted(name: str) -> str:
        return f"{len(benchmarks[name].load().samples)} samples"

    for name, entry in benchmarks.items():
        source = None if entry.declaration is None else entry.declaration.source
        if source is not None and source.dataset is not None:
            yield Check(
                f"benchmark {name}", Finding.NOTE, f"read from dataset {source.dataset!r} when a job asks for it"
            )
        else:
            by_package = source is None or source.package is not None
            yield _tried("benchmark", name, counted, Finding.MISSING if by_package else Finding.NOTE)


def _exits() -> Check:
    from engine.exits import known_exits

    return Check("exits", Finding.OK, ", ".join(known_exits()))


def _database(settings: Settings) -> Check:
    from contextlib import closing

    from db import schema
    from db.session import open_database

    file = Path(settings.database_url.removeprefix("sqlite:///"))
    if settings.database_url.startswith("sqlite:///") and not file.exists() and _can_be_made(file):
        return Check("database", Finding.NOTE, f"{settings.database_url}, made by the first job")
    try:
        with closing(open_database(settings.database_url, create=False)) as database:
            return Check("database", Finding.OK, f"{database.shown}, schema {schema.head()}")
    except db.errors.OlderSchema as error:
        return Check("database", Finding.MISSING, str(error), "shortstop db upgrade")
    except db.errors.RecordError as error:
        return Check("database", Finding.MISSING, str(error))


def _can_be_made(file: Path) -> bool:
    """Whether the nearest folder above a file that exists can be written."""
    nearest = next(folder for folder in file.absolute().parents if folder.is_dir())
    return os.access(nearest, os.W_OK)


def _tried(word: str, name: str, look: Callable[[str], str], failed: Finding = Finding.MISSING) -> Check:
    """A check whose failure says, in its own words, what to do."""
    try:
        return Check(f"{word} {name}", Finding.OK, look(name))
    except engine.errors.BadInput as error:
        command = re.search(r"`([^`]+)`", str(error))
        return Check(f"{word} {name}", failed, str(error), command.group(1) if command else None)
