"""Where source code to learn from comes from: folders, installed packages, source archives, JSONL, `datasets`.

A source knows its documents by number, so that files can be drawn without reading all of them.
"""

import gzip
import json
import os
import shutil
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib.metadata import PackageMetadata, PackageNotFoundError, metadata, packages_distributions
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import IO, Any

from engine.errors import BadInput
from engine.languages import LARGEST_FILE, LONGEST_LINE

STDLIB = "stdlib"  #: the name under which Python's own library can be a source
_DATASETS = "datasets:"
_ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip", ".whl")
_ROWS = (".jsonl", ".jsonl.gz")
_NOT_SOURCE = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
#: columns of a row, by what data sets of code call them
_TEXT = ("text", "content", "code", "whole_func_string", "original_string", "func_code_string")
_PROJECT = ("project", "repo", "repo_name", "repository_name", "repository")
_PATH = ("path", "file", "func_path_in_repository", "id")
_LICENCE = ("licence", "license")


@dataclass(frozen=True)
class Document:
    """One file or row."""

    name: str  #: within its source
    project: str
    text: str


@dataclass(frozen=True)
class Source:
    """Documents by number, and what is known of them before they are read."""

    name: str
    version: str | None
    licence: str | None
    projects: Sequence[str]  #: of each document
    read: Callable[[int], Document | None]  #: None where there is no text to learn from
    close: Callable[[], None] = lambda: None

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_source(source: str, extensions: frozenset[str]) -> Source:
    """Find a source. Raises `BadInput` where there is none, or where it cannot be read."""
    try:
        if source.startswith(_DATASETS):
            return _dataset(source.removeprefix(_DATASETS))
        path = Path(source).expanduser()
        if path.is_file() and source.endswith(_ARCHIVES):
            return _archive(path, extensions)
        if path.is_file() and source.endswith(_ROWS):
            return _rows(path)
        return _folder(source, source_folder(source), extensions)
    except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise BadInput(f"corpus: {source!r} cannot be read ({error}); get it again.") from None


def source_folder(source: str) -> Path:
    """A folder as given, or the folder of an installed package, which is not imported. Raises `BadInput`."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if source == STDLIB:
        return Path(sysconfig.get_path("stdlib"))
    found = find_spec(source) if source.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise BadInput(
            f"corpus: {source!r} is neither a folder nor an installed package, an archive ({', '.join(_ARCHIVES)}), "
            f"a file of rows ({', '.join(_ROWS)}) or {_DATASETS}<name>; correct it or install the package."
        )
    return Path(found.submodule_search_locations[0])


def check_apart(corpus: list[str], holdout: list[str]) -> None:
    """What is measured must not have been learned. Raises `BadInput`."""
    for learned in corpus:
        for kept in holdout:
            if _holds(learned, kept) or _holds(kept, learned):
                raise BadInput(f"holdout: {kept!r} overlaps the corpus source {learned!r}; keep them apart.")


def clean(content: bytes) -> str | None:
    """The text of a file, line ends as line feeds; None where nobody would complete in it."""
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        return None
    if not text.strip() or "\0" in text or max(map(len, text.split("\n"))) > LONGEST_LINE:
        return None
    return text


def _holds(source: str, other: str) -> bool:
    """Whether the files of one source are among those of another, or are those."""
    if source == other:
        return True
    if any(name.startswith(_DATASETS) for name in (source, other)):
        return False
    outer, inner = (path if path.is_file() else source_folder(str(path)) for path in map(_expanded, (source, other)))
    outer, inner = outer.resolve(), inner.resolve()
    return outer == inner or (outer in inner.parents and not _NOT_SOURCE & set(inner.relative_to(outer).parts))


def _expanded(source: str) -> Path:
    return Path(source).expanduser()


def _folder(source: str, root: Path, extensions: frozenset[str]) -> Source:
    names = []
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if name not in _NOT_SOURCE and not name.startswith("."))
        names += [Path(folder, name).relative_to(root).as_posix() for name in files if _ends(name, extensions)]
    names.sort()
    is_path = _expanded(source).is_dir()
    name, about = (root.name, None) if is_path else (source, _installed(source))

    def read(number: int) -> Document | None:
        path = root / names[number]
        try:
            if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST_FILE:
                return None
            text = clean(path.read_bytes())
        except OSError:
            return None
        return text and Document(names[number], name, text)  # type: ignore[return-value]

    version = sysconfig.get_python_version() if source == STDLIB else about["Version"] if about else None
    licence = "PSF-2.0" if source == STDLIB else _licence(about) or _licence_file(root)
    return Source(name, version, licence, [name] * len(names), read)


def _archive(path: Path, extensions: frozenset[str]) -> Source:
    """A source distribution or wheel, read as it is: nothing of it is written anywhere."""
    files: dict[str, bytes] = {}
    about = None
    if path.name.endswith((".zip", ".whl")):
        with zipfile.ZipFile(path) as packed:
            sizes = {info.filename: info.file_size for info in packed.infolist() if not info.is_dir()}
            wanted = [name for name in sizes if _is_wanted(name, sizes[name], extensions)]
            files = {name: packed.read(name) for name in wanted}
    else:
        with tarfile.open(path) as packed_tar:
            for member in packed_tar:
                if member.isfile() and _is_wanted(member.name, member.size, extensions):
                    files[member.name] = packed_tar.extractfile(member).read()  # type: ignore[union-attr]
    for name in [name for name in files if PurePosixPath(name).name in ("PKG-INFO", "METADATA")]:
        content = files.pop(name)
        about = about or HeaderParser().parsestr(content.decode("utf-8", "replace"))
    names = sorted(files)
    project = str(about["Name"]) if about else path.name.split(".")[0]

    def read(number: int) -> Document | None:
        text = clean(files[names[number]])
        return text and Document(names[number], project, text)  # type: ignore[return-value]

    version = str(about["Version"]) if about else None
    return Source(path.name, version, _licence(about), [project] * len(names), read)


def _rows(path: Path) -> Source:
    """Lines of JSON. A packed file is unpacked once into a temporary one, so that rows can be drawn."""
    file: IO[bytes]
    if path.name.endswith(".gz"):
        file = tempfile.TemporaryFile()  # noqa: SIM115 open until the source is closed
        with gzip.open(path) as packed:
            shutil.copyfileobj(packed, file)
        file.seek(0)
    else:
        file = path.open("rb")
    try:
        offsets, projects, licences = _row_index(path, file)
    except BaseException:
        file.close()
        raise

    def read(number: int) -> Document | None:
        file.seek(offsets[number])
        return _document(json.loads(file.readline()), number, path.name)

    return Source(path.name, None, ", ".join(sorted(licences)), projects, read, file.close)


def _row_index(path: Path, file: IO[bytes]) -> tuple[list[int], list[str], set[str]]:
    """Where each row begins, its project, and the licences that there are. Raises `BadInput`."""
    offsets: list[int] = []
    projects: list[str] = []
    licences: set[str] = set()
    at = 0
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise BadInput(f"corpus: {path}, line {number} is not JSON ({error}); correct or remove it.") from None
            if not isinstance(row, dict) or _of(row, _TEXT) is None:
                raise BadInput(
                    f"corpus: {path}, line {number} has no text; name it in one of the fields {', '.join(_TEXT)}."
                )
            offsets.append(at)
            projects.append(str(_of(row, _PROJECT) or path.name))
            licences.add(str(_of(row, _LICENCE) or "unknown"))
        at += len(line)
    return offsets, projects, licences


def _dataset(name: str) -> Source:
    import datasets

    try:
        folder = Path(name).expanduser()
        found = datasets.load_from_disk(str(folder)) if folder.is_dir() else datasets.load_dataset(name, split="train")
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise BadInput(
            f"corpus: data set {name!r} cannot be had ({type(error).__name__}: {reason}); give a folder that "
            "save_to_disk wrote, or a hub id where there is a network."
        ) from None
    rows: Any = found["train"] if isinstance(found, dict) else found
    project = next((column for column in _PROJECT if column in rows.column_names), None)
    licence = next((column for column in _LICENCE if column in rows.column_names), None)
    if not any(column in rows.column_names for column in _TEXT):
        raise BadInput(f"corpus: data set {name!r} has no column of text; it needs one of {', '.join(_TEXT)}.")
    licences = "unknown" if licence is None else ", ".join(sorted(set(map(str, rows.unique(licence)))))
    projects = [str(value) for value in rows[project]] if project else [name] * len(rows)
    return Source(name, None, licences, projects, lambda number: _document(rows[number], number, name))


def _document(row: dict[str, Any], number: int, source: str) -> Document | None:
    text = clean(str(_of(row, _TEXT)).encode())
    project = str(_of(row, _PROJECT) or source)
    return text and Document(f"{number}:{_of(row, _PATH) or ''}", project, text)  # type: ignore[return-value]


def _of(row: dict[str, Any], columns: tuple[str, ...]) -> Any:
    return next((row[column] for column in columns if row.get(column)), None)


def _ends(name: str, extensions: frozenset[str]) -> bool:
    return PurePosixPath(name).suffix.lower() in extensions


def _is_wanted(name: str, size: int, extensions: frozenset[str]) -> bool:
    path = PurePosixPath(name)
    about = path.name in ("PKG-INFO", "METADATA") and len(path.parts) <= 2
    return about or (size <= LARGEST_FILE and _ends(name, extensions) and not _NOT_SOURCE & set(path.parts))


def _installed(package: str) -> PackageMetadata | None:
    try:
        return metadata(next(iter(packages_distributions().get(package, [package]))))
    except (PackageNotFoundError, ValueError):
        return None


def _licence(about: Any) -> str | None:
    """As a distribution states it: an expression, a classifier, or the first line of a field."""
    if about is None:
        return None
    if about["License-Expression"]:
        return str(about["License-Expression"])
    for classifier in about.get_all("Classifier") or []:
        if classifier.startswith("License :: "):
            return str(classifier.rsplit(" :: ", 1)[1])
    return str(about["License"]).strip().split("\n", 1)[0] if about["License"] else None


def _licence_file(root: Path) -> str | None:
    """The first line of a folder's licence."""
    for path in sorted(root.glob("LICEN[CS]E*")) + sorted(root.glob("COPYING*")):
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            return next((line.strip() for line in lines if line.strip()), None)
    return None
