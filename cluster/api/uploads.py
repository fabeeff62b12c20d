"""What clients upload: a zip archive of source code, JSON lines or exits, unpacked into a folder of its own.

The folder's name is made of what is in it: the same content twice is one upload. Nothing of an archive is trusted, not
its sizes and not its names.
"""

import hashlib
import os
import shutil
import stat
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Annotated

import structlog
from anyio import to_thread
from fastapi import APIRouter, Request

from cluster.api.access import Submitter
from cluster.api.allowed import UPLOAD
from cluster.api.limits import check_type
from cluster.api.problems import Problem, described
from cluster.api.state import State, StateOf
from engine.errors import BadInput

log = structlog.get_logger()
router = APIRouter(tags=["uploads"])

MEDIA_TYPE = "application/zip"
MOST_FILES = 20_000
LONGEST_NAME = 400
DEEPEST = 40
#: how many times its packed size an upload may have
_UNPACKED = 4
#: an upload that was made or used within this time is not removed to make room
_KEPT_SECONDS = 3600.0
_PIECE = 1 << 20


@dataclass(frozen=True)
class Uploaded:
    """An upload that specs may name."""

    upload: str  #: `upload:ID`; a spec names `upload:ID/` and a path in the archive
    files: int
    bytes: int  #: unpacked


@router.post(
    "/v1/uploads",
    status_code=201,
    responses=described("too-large", "wrong-media-type"),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def upload(request: Request, caller: Submitter, state: Annotated[State, StateOf]) -> Uploaded:
    """Upload a folder of source code, JSON lines or exits as a zip archive, to be named by specs.

    Only files and folders: no links, no devices, no names that lead out of it. Pack one folder, and a spec names it as
    `source: upload:ID/FOLDER`.
    """
    check_type(request, MEDIA_TYPE)
    state.uploads.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryFile(dir=state.uploads) as packed:
        async for piece in request.stream():  # its size is bounded on the way here
            await to_thread.run_sync(packed.write, piece)
        most, of_all = state.settings.upload_mb, state.settings.uploads_mb
        done = await to_thread.run_sync(keep, packed, state.uploads, most, of_all)
    log.info("uploaded", who=caller.name, upload=done.upload, files=done.files, bytes=done.bytes)
    return done


def keep(packed: IO[bytes], uploads: Path, upload_mb: int, uploads_mb: int) -> Uploaded:
    """Unpack an archive into the folder of uploads. Raises `BadInput`, `Problem`; nothing is left of it then."""
    folder = Path(tempfile.mkdtemp(dir=uploads, prefix=".partial-"))
    try:
        names, size = _unpack(packed, folder, _UNPACKED * upload_mb << 20)
        id = _content_id(folder, names)
        _make_room(uploads, size, uploads_mb << 20)
        place = uploads / id
        try:
            folder.rename(place)
        except OSError:  # it is there already
            os.utime(place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Uploaded(f"{UPLOAD}{id}", len(names), size)


def _unpack(packed: IO[bytes], folder: Path, most: int) -> tuple[list[str], int]:
    """Write the archive's files. Returns their names and how many bytes they have."""
    names: list[str] = []
    left = most
    try:
        with zipfile.ZipFile(packed) as archive:
            if len(archive.infolist()) > MOST_FILES:
                raise BadInput(f"archive: it has more than {MOST_FILES:,} entries; upload less.")
            for entry in archive.infolist():
                name = _safe_name(entry)
                if entry.is_dir():
                    continue
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, target.open("xb") as file:
                    for piece in iter(lambda: source.read(min(_PIECE, left + 1)), b""):  # noqa: B023
                        left -= len(piece)
                        if left < 0:
                            raise BadInput(f"archive: it unpacks to more than {most:,} bytes; upload less.")
                        file.write(piece)
                names.append(name)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        name = ascii(Path(error.filename).name)
        raise BadInput(f"archive: {name} is there twice, or as a file and as a folder; pack it again.") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"archive: it is no zip file that can be read ({reason!a}); pack it again.") from None
    if not names:
        raise BadInput("archive: it holds no file; pack a folder that has some.")
    return names, most - left


def _safe_name(entry: zipfile.ZipInfo) -> str:
    """The entry's name, which leads nowhere but into the archive. Raises `BadInput`."""
    mode = entry.external_attr >> 16
    path = PurePosixPath(entry.filename)
    fault = None
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        fault = "is no file and no folder: links and devices are not taken"
    elif path.is_absolute() or ".." in path.parts or "\\" in entry.filename or ":" in entry.filename:
        fault = "leads out of the archive"
    elif not path.parts or len(entry.filename.encode(errors="replace")) > LONGEST_NAME or len(path.parts) > DEEPEST:
        fault = f"is empty, longer than {LONGEST_NAME} bytes or deeper than {DEEPEST} folders"
    elif any(len(part.encode(errors="replace")) > 255 for part in path.parts) or not entry.filename.isprintable():
        fault = "is no name that every disk can hold"
    elif any(part.lower() == ".git" for part in path.parts):
        fault = "is a repository, which may point anywhere"
    if fault:
        raise BadInput(f"archive: {ascii(entry.filename)[:80]} {fault}; pack it without.")
    return str(path)


def _content_id(folder: Path, names: list[str]) -> str:
    whole = hashlib.sha256()
    for name in sorted(names):
        with (folder / name).open("rb") as file:
            content = hashlib.file_digest(file, "sha256")
        whole.update(f"{name}\0{content.hexdigest()}\0".encode())
    return whole.hexdigest()[:32]


def _make_room(uploads: Path, size: int, most: int) -> None:
    """Remove the oldest uploads until another `size` bytes fit. Raises `Problem` where the rest is too young."""
    kept = sorted((place.stat().st_mtime, place) for place in uploads.iterdir() if not place.name.startswith("."))
    sizes = {place: sum(_sizes(place)) for _, place in kept}
    taken = sum(sizes.values())
    for used, place in kept:
        if taken + size <= most or time.time() - used < _KEPT_SECONDS:
            break
        shutil.rmtree(place, ignore_errors=True)
        taken -= sizes[place]
    if taken + size > most:
        raise Problem("too-large", f"The uploads of this server are full ({most:,} bytes); try again in an hour.")


def _sizes(folder: Path) -> Iterator[int]:
    for at, _, files in os.walk(folder):
        yield from (os.stat(os.path.join(at, name)).st_size for name in files)
