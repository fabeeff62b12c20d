"""What a client takes along to a server: the local folders and files that a spec names, packed."""

import io
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from cluster.places import Field, meant, placed
from cluster.spec import JobSpec
from engine.errors import BadInput
from workers.benchmarks.lines import language_named
from workers.benchmarks.spec import SourceBenchmark

#: always the same, so that the same content is the same archive
_DATE = (1980, 1, 1, 0, 0, 0)
#: as `workers.benchmarks.files` passes them over
_NOT_SOURCE = {"__pycache__", "node_modules"}


def uploaded(spec: JobSpec, folder: Path, send: Callable[[bytes], str]) -> JobSpec:
    """The spec with uploads in place of what lies on this machine: source code, JSON lines, exits.

    folder: what relative paths start from. send: uploads a zip archive and returns how specs name it. A path that is
    not there is taken for one on the server. Raises `BadInput` for a relative one, and for what cannot be uploaded.
    """
    extensions = {
        extension
        for asked in spec.benchmarks
        if isinstance(asked, SourceBenchmark)
        for extension in language_named(asked.language).extensions
    }

    def place(field: Field, value: str) -> str:
        found = meant(field, value, folder)
        if found is None or value.startswith("upload:"):
            return value
        if not found.exists():
            if Path(value).is_absolute():
                return value
            raise BadInput(f"{field} {value!r}: there is no such file here ({found}); correct the path.")
        if field in ("model", "benchmark", "dataset"):
            return str(found)  # the server may have it in the same place
        archive = packed(found, extensions if field == "source" else None)
        return f"{send(archive)}/{found.name}"

    return placed(spec, place)


def packed(path: Path, extensions: set[str] | None = None) -> bytes:
    """A file, or a folder's files with one of these extensions, as a zip archive with one name at its top."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in [path] if path.is_file() else sorted(_files(path, extensions)):
            name = (Path(path.name) / file.relative_to(path)).as_posix() if file != path else path.name
            archive.writestr(zipfile.ZipInfo(name, _DATE), file.read_bytes(), zipfile.ZIP_DEFLATED)
    return out.getvalue()


def _files(folder: Path, extensions: set[str] | None) -> Iterator[Path]:
    """Regular files below a folder, links not followed; of source code only what a benchmark would look at."""
    for at, subfolders, names in os.walk(folder):
        if extensions is not None:
            subfolders[:] = [name for name in subfolders if _may_hold_source(Path(at) / name)]
        for name in names:
            file = Path(at) / name
            wanted = extensions is None or file.suffix.lower() in extensions
            if wanted and file.is_file() and not file.is_symlink():
                yield file


def _may_hold_source(folder: Path) -> bool:
    return not (folder.name.startswith(".") or folder.name in _NOT_SOURCE or (folder / "pyvenv.cfg").exists())
