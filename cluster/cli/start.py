"""How commands that need settings, the database or a file to write begin."""

import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import BadInput

if TYPE_CHECKING:
    from cluster.service import Service
    from cluster.settings import Settings
    from db.session import Database


def service(
    database_url: str | None = None,
    workers: int | None = None,
    server: str | None = None,
    ray_address: str | None = None,
    gpus_per_worker: float | None = None,
    *,
    inline: bool = False,
) -> "closing[Service]":
    """Who does what a command asks for, for a `with` block: a server where one is named, and no database is.

    Raises `BadInput` for options that belong to the other.
    """
    settings = start(database_url, workers, ray_address, gpus_per_worker, server=server)
    if database_url is not None or settings.server is None:
        if server is not None:
            raise BadInput(f"--database {database_url!r} and --server {server!r}: give one of them.")
        from cluster.local import Local

        return closing(Local(settings))
    mine = {"--workers": workers, "--ray-address": ray_address, "--gpus-per-worker": gpus_per_worker}
    if option := "--inline" if inline else next((name for name, value in mine.items() if value is not None), None):
        raise BadInput(f"{option}: the workers belong to the server {settings.server!r}; leave it out, or --server.")
    from cluster.client import Client

    return closing(Client(settings.server, settings.key))


def start(
    database_url: str | None = None,
    workers: int | None = None,
    ray_address: str | None = None,
    gpus_per_worker: float | None = None,
    *,
    server: str | None = None,
    allow: list[str] | None = None,
) -> "Settings":
    """The settings with a command's options on top; logs set up as they say. Raises `BadInput`."""
    from cluster.logs import configure_logs
    from cluster.settings import load_settings

    settings = load_settings(
        database_url=database_url,
        workers=workers,
        ray_address=ray_address,
        gpus_per_worker=gpus_per_worker,
        server=server,
        allow=allow or None,
    )
    configure_logs(settings.log_level)
    return settings


def opened(settings: "Settings", *, create: bool = True) -> "closing[Database]":
    """The database, for a `with` block. create=False refuses one that is not there. Raises `db.errors.BadInput`."""
    from db.session import open_database

    return closing(open_database(settings.database_url, create=create))


def writable(file: str | None) -> Path | None:
    """The file of an option, refused before any work is done for it where it cannot be written. Raises `BadInput`."""
    if file is None:
        return None
    path = Path(file).expanduser()
    folder = path.absolute().parent
    if path.is_dir():
        raise BadInput(f"file {file!r} is a folder; give the name of a file in it.")
    if not folder.is_dir():
        raise BadInput(f"file {file!r}: there is no folder {folder}; make it, or give another.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise BadInput(f"file {file!r} cannot be written; give one in a folder of yours.")
    return path
