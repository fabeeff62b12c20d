"""How loops are compiled for this processor, by numba, and where they are kept."""

import os
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zlib import crc32

import llvmlite.binding as llvm
import numba as nb
import numpy as np
import numpy.typing as npt
from numba import float32, int64

from engine import openmp
from engine.loading import cache_folder

Floats = npt.NDArray[np.float32]


def _can_be_kept() -> bool:
    """Whether there is a folder for what was compiled.

    One for each processor, and for each text of these files, since numba looks at the file of a loop and not at those
    that it calls.
    """
    texts = [Path(__file__), *sorted(Path(__file__).parent.glob("native*.py")), Path(openmp.__file__)]
    version = crc32(b"".join(text.read_bytes() for text in texts))
    chosen = nb.config.CACHE_DIR  # NUMBA_CACHE_DIR
    folder = (Path(chosen) if chosen else cache_folder() / "numba") / f"{llvm.get_host_cpu_name()}-{version:08x}"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    nb.config.CACHE_DIR = str(folder) if os.access(folder, os.W_OK) else ""
    return bool(nb.config.CACHE_DIR)


KEPT = _can_be_kept()

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
            with suppress(OSError, EOFError, UnpicklingError):
                return compiler(*signature, cache=True, **options)(function)
        return compiler(*signature, **options)(function)

    return compile


def loop(signature: object) -> Any:
    """Compiled when its module is first imported on a machine."""
    return kept(nb.njit, signature, fastmath=FAST, nogil=True, error_model="numpy")
