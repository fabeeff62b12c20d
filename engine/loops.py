"""How loops are compiled for this processor, by numba, and where they are kept."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zlib import crc32

import llvmlite.binding as llvm
import numba as nb
import numpy as np
import numpy.typing as npt
from filelock import FileLock
from numba import float32, int64

from engine import openmp
from engine.loading import cache_folder

Floats = npt.NDArray[np.float32]


#: set in the process that compiles for all others: the folder that it fills
_FILLED = "_SHORTSTOP_LOOPS"


def _state() -> str:
    """What compiled loops hang on: the texts of these files, since numba looks at the file of a loop and not at those
    that it calls, and all that numba itself asks about.
    """
    texts = [Path(__file__), *_natives(), Path(openmp.__file__)]
    seen = [(str(text), text.stat().st_mtime_ns, text.read_bytes()) for text in texts]
    processor = (llvm.get_host_cpu_features().flatten(), nb.config.CPU_NAME, nb.config.CPU_FEATURES)
    return f"{llvm.get_host_cpu_name()}-{crc32(repr((nb.__version__, processor, seen)).encode()):08x}"


def _natives() -> list[Path]:
    return sorted(Path(__file__).parent.glob("native*.py"))


def _folder() -> Path | None:
    """Where all loops lie compiled; None where there is no such place.

    One process compiles them all, in one order, and the others wait: LLVM adds in another order where it meets a loop
    that it calls in the form in which it was kept, so what several processes compile together, each reading what the
    others have by then, differs in the last bits from one machine to the next.
    """
    if _FILLED in os.environ:
        return Path(os.environ[_FILLED])
    chosen = nb.config.CACHE_DIR  # NUMBA_CACHE_DIR
    try:
        folder = (Path(chosen) if chosen else cache_folder() / "numba") / _state()
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_suffix(".lock")):
                if not folder.is_dir():
                    _fill(folder)
    except (OSError, subprocess.CalledProcessError):  # this process compiles them, for itself
        return None
    return folder if os.access(folder, os.W_OK) else None  # numba does not read where it may not write


def _fill(folder: Path) -> None:
    """Raises `OSError` or `CalledProcessError` where not all could be kept."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        made = Path(beside) / folder.name
        made.mkdir()
        names = [f"engine.{text.stem}" for text in _natives()]
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); import {', '.join(names)}"
        environment = os.environ | {_FILLED: str(made), "PYTHONHASHSEED": "0"}
        subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        made.rename(folder)


KEPT = _folder()
nb.config.CACHE_DIR = str(KEPT or "")

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
    """`nb.njit` or `nb.cfunc`, kept in numba's cache; done anew where that is damaged, or the disk is full."""

    def compile(function: Any) -> Any:
        if KEPT:
            try:
                return compiler(*signature, cache=True, **options)(function)
            except (OSError, EOFError, UnpicklingError):
                if _FILLED in os.environ:
                    raise
        return compiler(*signature, **options)(function)

    return compile


def loop(signature: object) -> Any:
    """Compiled when its module is first imported on a machine."""
    return kept(nb.njit, signature, fastmath=FAST, nogil=True, error_model="numpy")
