"""An exit bundle on its way through the record: one archive, the same bytes wherever it is packed."""

import io
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

from engine.errors import BadInput
from engine.exits import MANIFEST, TENSORS, exits_hash


def pack(folder: Path) -> bytes:
    """The bundle's two files as a tar archive without times, owners or anything else of this machine."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in (MANIFEST, TENSORS):
            content = (folder / name).read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def unpack(content: bytes, hash: str, cache: Path) -> Path:
    """The folder below `cache` that holds the bundle, written whole or not at all. Raises `BadInput` if damaged."""
    folder = cache / "exits" / hash[:24]
    if folder.is_dir() and exits_hash(folder) == hash:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        _extract(content, made)
        if exits_hash(made) != hash:
            raise BadInput(f"exits: the record's copy of the bundle {hash[:12]}… is damaged; submit the job again.")
        shutil.rmtree(folder, ignore_errors=True)  # a damaged copy
        try:
            os.rename(made, folder)
        except OSError:  # another worker was faster
            if exits_hash(folder) != hash:
                raise
        return folder
    finally:
        shutil.rmtree(made, ignore_errors=True)


def packed_hash(content: bytes) -> str:
    """The `exits_hash` of a packed bundle; an empty text where it cannot be unpacked."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            _extract(content, Path(folder))
        except (tarfile.TarError, KeyError):
            return ""
        return exits_hash(Path(folder))


def _extract(content: bytes, folder: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for name in (MANIFEST, TENSORS):
            file = tar.extractfile(name)
            assert file is not None
            (folder / name).write_bytes(file.read())
