"""Where the lines of a large file begin: looked up once, kept in the user's cache, and mapped from there."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from engine.loading import cache_folder

#: bytes that are looked at together
_PIECE = 4 << 20
_IS_CODE = np.array([not bytes([byte]).isspace() for byte in range(256)])


class LineIndex:
    """The lines of a file that are not blank."""

    def __init__(self, rows: npt.NDArray[np.int64]) -> None:
        """rows: [n, 2] byte at which a line begins, and its number from 1 on."""
        self._rows = rows

    @classmethod
    def of(cls, file: IO[bytes]) -> "LineIndex":
        """The index of an open file, made anew where the file is not the one it was made of any more.

        Told by path, size, time of change and the bytes at both ends. Where it cannot be kept it is made again.
        """
        kept = cache_folder() / "lines" / f"{_identity(file)}.npy"
        try:
            return cls(np.load(kept, mmap_mode="r"))
        except (OSError, ValueError, EOFError):
            pass
        rows = _lines(file)
        try:
            _keep(kept, rows)
            return cls(np.load(kept, mmap_mode="r"))
        except (OSError, ValueError):
            return cls(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def offset(self, place: int) -> int:
        """In bytes."""
        return int(self._rows[place, 0])

    def number(self, place: int) -> int:
        """From 1 on, blank lines counted."""
        return int(self._rows[place, 1])


def _identity(file: IO[bytes]) -> str:
    about = os.fstat(file.fileno())
    whole = hashlib.sha256(repr((os.path.realpath(file.name), about.st_size, about.st_mtime_ns)).encode())
    for at in (0, max(0, about.st_size - 4096)):
        file.seek(at)
        whole.update(file.read(4096))
    return whole.hexdigest()[:32]


def _lines(file: IO[bytes]) -> npt.NDArray[np.int64]:
    """[n, 2]; memory stays within the index itself and a few pieces of the file."""
    file.seek(0)
    found: list[npt.NDArray[np.int64]] = []
    position, number = 0, 1  #: of the piece in the file, and of the line that is open where it begins
    start, filled = 0, False  #: where that line begins, and whether it has more than white space by now
    while piece := file.read(_PIECE):
        data = np.frombuffer(piece, np.uint8)
        is_code = _IS_CODE[data]
        ends = np.flatnonzero(data == ord("\n"))
        if len(ends):
            begins = np.concatenate([[0], ends[:-1] + 1])
            has_code = np.logical_or.reduceat(is_code[: ends[-1] + 1], begins)
            has_code[0] |= filled
            begins += position
            begins[0] = start
            kept = np.flatnonzero(has_code)
            found.append(np.stack([begins[kept], number + kept], axis=1))
            number += len(ends)
            start, filled = position + int(ends[-1]) + 1, False
            is_code = is_code[ends[-1] + 1 :]
        filled = filled or bool(is_code.any())
        position += len(piece)
    if filled:
        found.append(np.array([[start, number]]))
    return np.concatenate(found) if found else np.zeros((0, 2), np.int64)


def _keep(place: Path, rows: npt.NDArray[np.int64]) -> None:
    """All or nothing, whoever else does the same."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place.parent, suffix=".partial", delete=False) as file:
        try:
            np.save(file, rows)
            file.close()
            Path(file.name).replace(place)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
