"""How commands that need settings, the database or a file to write begin."""

import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import BadInput

if TYPE_CHECKING:
    from cluster.settings import Settings
    from db.session import Database


def start(
    database_url: str | None = None,
    workers: int | None = None,
    ray_address: str | None = None,
    gpus_per_worker: float | None = None,
) -> "Settings":
    """The settings with a command's options on top; logs set up as they say. Raises `BadInput`."""
    from cluster.logs import configure_logs
    from cluster.settings import load_settings

    settings = load_settings(
        database_url=database_url, workers=workers, ray_address=ray_address, gpus_per_worker=gpus_per_worker
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
