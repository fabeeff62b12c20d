"""Loops on the threads that PyTorch works with: one set of threads for all that a step does.

Threads of another set would take the cores from those that PyTorch keeps awake for its next product, and each would
have to be woken anew: 20 of 45 ms a step on two cores (`docs/decisions/kernels.md`). So a loop is handed to the very
OpenMP library that PyTorch has loaded, by GCC's interface to it, which LLVM's and Intel's libraries have too.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba as nb
import torch
from llvmlite import ir
from numba.extending import intrinsic

#: what a shared loop is called with: numbers and addresses, as its own caller and it have agreed
GIVEN = nb.void(nb.types.CPointer(nb.int64))
#: how one is compiled
OPTIONS: dict[str, Any] = {"nopython": True, "error_model": "numpy"}


@cache
def _library() -> ctypes.CDLL | None:
    """The OpenMP library of PyTorch; None where it has another kind of threads."""
    try:
        mappings = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # no Linux
        return None
    home = str(Path(torch.__file__).resolve().parent)
    loaded = {mapping.split(maxsplit=5)[-1] for mapping in mappings if "omp" in mapping}  # a path may have spaces
    names = [path for path in loaded if Path(path).name.startswith(("libgomp", "libomp", "libiomp"))]
    for path in sorted(names, key=lambda path: not path.startswith(home)):
        library = ctypes.CDLL(path)
        if hasattr(library, "GOMP_parallel"):
            library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
            return library
    return None


def _declare() -> None:
    """Let compiled loops find out which of how many threads they run in: alone, where there is no library."""
    library = _library()
    for name, alone in (("omp_get_thread_num", _FIRST), ("omp_get_num_threads", _ONE), ("GOMP_barrier", _GO_ON)):
        function = getattr(library, name) if library else alone
        llvm.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)


_FIRST = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
_ONE = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1)
_GO_ON = ctypes.CFUNCTYPE(None)(lambda: None)
_declare()
#: to be called in a shared loop
part = nb.types.ExternalFunction("omp_get_thread_num", nb.int32())
parts = nb.types.ExternalFunction("omp_get_num_threads", nb.int32())
#: all threads meet here
barrier = nb.types.ExternalFunction("GOMP_barrier", nb.void())


@intrinsic
def at(typing: Any, address: Any) -> Any:
    """An address as a pointer, for `numba.carray`."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(nb.types.voidptr))

    return nb.types.voidptr(nb.int64), build


def available() -> bool:
    """Whether loops can be shared between threads."""
    return _library() is not None


def share(loop: Any, given: Any, threads: int) -> None:
    """Run a compiled loop (`numba.cfunc(GIVEN)`) in each of so many threads at once; `given` is an array of c_int64."""
    library = _library()
    if library is None or threads == 1:
        loop.ctypes(ctypes.cast(given, ctypes.POINTER(ctypes.c_int64)))
    else:
        library.GOMP_parallel(loop.address, ctypes.addressof(given), threads, 0)
