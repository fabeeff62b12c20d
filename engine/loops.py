"""How loops are compiled for this processor, by numba, and where they are kept."""

import logging
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zlib import crc32

import llvmlite
import llvmlite.binding as llvm
import numba as nb
import numpy as np
import numpy.typing as npt
from filelock import FileLock
from numba import float32, int64
from numba.core.ccallback import CFunc

from engine import openmp
from engine.loading import cache_folder

_log = logging.getLogger(__name__)
Floats = npt.NDArray[np.float32]

#: set in the process that compiles for all others: the folder that it fills
_FILLED = "_SHORTSTOP_LOOPS"
_FILLING = _FILLED in os.environ
#: lies in a folder that has all loops
_WHOLE = "whole"
_CHOSEN = nb.config.CACHE_DIR  # NUMBA_CACHE_DIR
_SECONDS = 900  #: to wait for all loops, which take half a minute


def _state() -> str:
    """What compiled loops hang on: the texts of these files, since numba looks at the file of a loop and not at those
    that it calls; the interpreter, the compiler, the processor and numba's settings.
    """
    texts = [Path(__file__), *_natives(), Path(openmp.__file__)]
    seen = [(str(text), text.stat().st_mtime_ns, text.read_bytes()) for text in texts]
    tools = (sys.implementation.cache_tag, sys.abiflags, nb.__version__, llvmlite.__version__)
    set_here = sorted(one for one in os.environ.items() if one[0].startswith("NUMBA_") and one[0] != "NUMBA_CACHE_DIR")
    known = repr((tools, llvm.get_host_cpu_features().flatten(), set_here, seen))
    return f"{llvm.get_host_cpu_name()}-{crc32(known.encode()):08x}"


def _natives() -> list[Path]:
    return sorted(Path(__file__).parent.glob("native*.py"))


def _folder() -> Path | None:
    """Where all loops lie compiled; None where there is no such place.

    One process compiles them all, in one order, and the others wait: LLVM adds in another order where it meets a loop
    that it calls in the form in which it was kept, so what several processes compile together, each reading what the
    others have by then, has other last bits from one time to the next.
    """
    if _FILLING:
        return Path(os.environ[_FILLED])
    try:
        folder = (Path(_CHOSEN) if _CHOSEN else cache_folder() / "numba") / _state()
        if not (folder / _WHOLE).is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_suffix(".lock"), timeout=_SECONDS):
                if not (folder / _WHOLE).is_file():
                    _fill(folder)
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("loops are compiled for this process alone, since they cannot be kept: %s", error)
        return None
    return folder if os.access(folder, os.W_OK) else None  # numba does not read where it may not write


def _fill(folder: Path) -> None:
    """Raises `OSError` or `SubprocessError` where not all could be kept."""
    if not sys.executable:
        raise OSError("there is no Python to run")
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        made = Path(beside) / folder.name
        made.mkdir()
        names = ", ".join(f"engine.{text.stem}" for text in _natives())
        # what it ends with tells more than its exit status, which is 0 where a parent ignores the death of children
        code = f"import sys; sys.path[:] = {sys.path!r}; import {names}; open({str(made / _WHOLE)!r}, 'w').close()"
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {_FILLED: str(made), "PYTHONHASHSEED": "0"},
            check=True,
            timeout=_SECONDS,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if not (made / _WHOLE).is_file():
            raise OSError("the process that compiles them ended early")
        with suppress(FileNotFoundError):  # one that is damaged
            folder.rename(Path(beside) / "damaged")
        made.rename(folder)


class _Kept:
    """The folder of all loops, filled anew once where something in it is gone or damaged."""

    def __init__(self) -> None:
        self._renewed = False
        self._open(_folder())

    def _open(self, folder: Path | None) -> None:
        self.folder, self._made = folder, None if folder is None else folder.stat().st_ino
        nb.config.CACHE_DIR = str(folder or "")

    def renew(self) -> None:
        """No folder is left where it was renewed before."""
        assert self.folder is not None
        if not self._renewed:
            with suppress(OSError):  # another process has done it
                if self.folder.stat().st_ino == self._made:
                    (self.folder / _WHOLE).unlink()
        self._open(None if self._renewed else _folder())
        self._renewed = True


KEPT = _Kept()

#: sums in any order and fused multiply-add; infinities and NaN stay what they are
FAST = {"reassoc", "contract", "nsz", "arcp"}
ROW = float32[::1]
TABLE = float32[:, ::1]
CUBE = float32[:, :, ::1]
CACHE = float32[:, :, :, ::1]
STRIDED = nb.types.Array(float32, 3, "A")
PLACES = int64[::1]
HIDDEN = int64[:, ::1]
HIDDEN_ROW = int64[::1]


def kept(compiler: Any, *signature: Any, **options: Any) -> Any:
    """`nb.njit` or `nb.cfunc`, read from the folder of all loops; compiled for this process where there is none."""

    def compile(function: Any) -> Any:
        while KEPT.folder is not None:
            try:
                made = compiler(*signature, cache=True, **options)(function)
                if _FILLING or was_kept(made):
                    return made
            except (OSError, EOFError, UnpicklingError, ValueError):
                if _FILLING:
                    raise
            KEPT.renew()
        return compiler(*signature, **options)(function)

    return compile


def was_kept(made: Any) -> bool:
    """Whether a compiled loop was read, not compiled."""
    return bool(made.cache_hits if isinstance(made, CFunc) else sum(made.stats.cache_hits.values()))


def loop(signature: object) -> Any:
    """Compiled, with all others, when the first is imported on a machine."""
    return kept(nb.njit, signature, fastmath=FAST, nogil=True, error_model="numpy")
