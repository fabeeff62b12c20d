"""What a client takes along to a server: the local folders and files that a spec names, packed."""

import io
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cluster.places import Field, meant, placed
from cluster.spec import JobSpec
from engine.errors import BadInput
from engine.spec import Spec
from workers.benchmarks.files import source_bytes
from workers.benchmarks.spec import SourceBenchmark

#: always the same, so that the same content is the same archive
_DATE = (1980, 1, 1, 0, 0, 0)


def uploaded(spec: JobSpec, folder: Path, send: Callable[[bytes], str]) -> JobSpec:
    """The spec with uploads in place of what lies on this machine: source code, JSON lines, exits.

    folder: what relative paths start from. send: uploads a zip archive and returns how specs name it. A path that is
    not there is taken for one on the server. Of a git repository what is tracked, or the revision that is asked for,
    goes there as plain files. Raises `BadInput` for a relative path that is not there, and for what cannot be uploaded.
    """

    def source(asked: Spec) -> Spec:
        found = meant("source", asked.source, folder) if isinstance(asked, SourceBenchmark) else None
        if found is None or not isinstance(asked, SourceBenchmark):
            return asked
        archive = packed_source(asked.model_copy(update={"source": str(found)}))
        return asked.model_copy(update={"source": f"{send(archive)}/{found.name}", "revision": None})

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
        return f"{send(packed(found))}/{found.name}"

    return placed(spec.model_copy(update={"benchmarks": [source(asked) for asked in spec.benchmarks]}), place)


def packed_source(asked: SourceBenchmark) -> bytes:
    """The files of a folder that its benchmark looks at, as a zip archive with the folder's name at its top."""
    root = Path(asked.source).name
    return _zipped((f"{root}/{name}", content) for name, content in source_bytes(asked))


def packed(path: Path) -> bytes:
    """A file, or all files of a folder, as a zip archive with one name at its top."""
    files = [path] if path.is_file() else sorted(_files(path))
    names = [path.name if file == path else (Path(path.name) / file.relative_to(path)).as_posix() for file in files]
    return _zipped((name, file.read_bytes()) for name, file in zip(names, files, strict=True))


def _zipped(files: Iterable[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(zipfile.ZipInfo(name, _DATE), content, zipfile.ZIP_DEFLATED)
    return out.getvalue()


def _files(folder: Path) -> Iterator[Path]:
    """Regular files below a folder, links not followed."""
    for at, _, names in os.walk(folder):
        for name in names:
            file = Path(at) / name
            if file.is_file() and not file.is_symlink():
                yield file
