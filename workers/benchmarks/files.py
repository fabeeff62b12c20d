"""Finding source files: below a folder, at a git revision, or in an installed package, which is found, never imported.

What is found is then judged: links, other people's code, generated code and text that nobody completes are passed over,
each with a sentence.
"""

import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import packages_distributions
from pathlib import Path, PurePosixPath

from engine.errors import BadInput
from engine.languages import LARGEST_FILE, LONGEST_LINE
from workers.benchmarks.generated import Attributes, globs, vendored_folder, why_generated
from workers.benchmarks.lines import LANGUAGES, languages_by_extension
from workers.benchmarks.repository import Blob, files_at, tracked_files
from workers.benchmarks.spec import SourceBenchmark

_NOT_SOURCE = {"__pycache__", "node_modules"}
_ATTRIBUTES = ".gitattributes"
_LINK = "it is a symbolic link, and links are not followed"


@dataclass(frozen=True)
class SourceFiles:
    """The text of each file by its path relative to the root, in the order of those paths.

    Line ends are line feeds, whatever the checkout made of them.
    """

    texts: dict[str, str]
    languages: dict[str, str]  #: of each file
    left_out: list[str] = field(default_factory=list)  #: a sentence for each file or folder passed over


@dataclass(frozen=True)
class _Found:
    """What there is at a source, before anything of it is judged."""

    names: list[str]
    read: Callable[[str], bytes]  #: raises `_LeftOut`, `OSError`
    passed_over: dict[str, str] = field(default_factory=dict)  #: folders that are not looked into, and why


class _LeftOut(Exception):
    """Why a file is passed over."""


def read_source(spec: SourceBenchmark) -> SourceFiles:
    """The files of the languages that a spec asks for, as its other fields choose them.

    Of a folder in a git repository those that it tracks, of a `revision` those that it has; of other folders all.
    Hidden folders, virtual environments, `node_modules` and caches are not looked into, and symbolic links are never
    followed: what they point to counts where it lies. Raises `BadInput` when there is no such folder, package or
    revision.
    """
    texts: dict[str, str] = {}
    languages: dict[str, str] = {}
    left_out: dict[str, str] = {}
    with _found(spec) as found:
        attributes = _attributes(found)
        wanted, copied = _chosen(spec, found, attributes)
        left_out |= found.passed_over
        for folder, files in copied.items():
            left_out[f"{folder}/"] = f"it holds copies of other people's code, {files:,} file{'s' * (files > 1)}"
        for name, language in wanted.items():
            try:
                texts[name] = _text(found, name, language, attributes)
                languages[name] = language
            except _LeftOut as reason:
                left_out[name] = str(reason)
    sentences = [f"{ascii(name)[1:-1]} is left out: {left_out[name]}." for name in sorted(left_out)]
    return SourceFiles(texts, languages, sentences)


def source_bytes(spec: SourceBenchmark) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file that `read_source` reads, in order: what a client takes along to a server."""
    with _found(spec) as found:
        wanted, _ = _chosen(spec, found, _attributes(found))
        for name in [*wanted, *({_ATTRIBUTES} & {*found.names})]:
            try:
                name.encode()
                yield name, found.read(name)
            except (_LeftOut, OSError, UnicodeEncodeError):
                continue


def _chosen(spec: SourceBenchmark, found: _Found, attributes: Attributes) -> tuple[dict[str, str], Counter[str]]:
    """The language of each file to read, in order, and how many files lie in each folder of copied code."""
    extensions = languages_by_extension(spec.languages)
    include, exclude = globs(spec.include), globs(spec.exclude)
    wanted: dict[str, str] = {}
    copied: Counter[str] = Counter()
    for name in sorted(found.names):
        language = extensions.get(PurePosixPath(name).suffix.lower())
        if language is None or exclude.match_file(name) or (spec.include and not include.match_file(name)):
            continue
        says = attributes.says(name, "linguist-vendored")
        folder = vendored_folder(name) if says is None else PurePosixPath(name).parent.as_posix() if says else None
        if folder is None:
            wanted[name] = language
        else:
            copied[folder] += 1
    return wanted, copied


def _attributes(found: _Found) -> Attributes:
    try:
        return Attributes(found.read(_ATTRIBUTES).decode("utf-8", "replace") if _ATTRIBUTES in found.names else "")
    except (_LeftOut, OSError):
        return Attributes("")


def _text(found: _Found, name: str, language: str, attributes: Attributes) -> str:
    """The file's text, where somebody may complete it. Raises `_LeftOut`."""
    try:
        name.encode()
        text = found.read(name).decode("utf-8-sig")
    except UnicodeEncodeError:
        raise _LeftOut("its name is not UTF-8") from None
    except UnicodeDecodeError as error:
        raise _LeftOut(f"byte {error.start + 1} is not UTF-8") from None
    except OSError as error:
        raise _LeftOut(f"it cannot be read ({error.strerror})") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        raise _LeftOut("it holds null characters")
    if not text.strip():
        raise _LeftOut("it is empty")
    longest = max(map(len, text.split("\n")))
    if longest > LONGEST_LINE:
        raise _LeftOut(f"its longest line has {longest:,} characters, more than {LONGEST_LINE:,}")
    says = attributes.says(name, "linguist-generated")
    reason = ".gitattributes says so" if says else None
    if says is None:
        reason = why_generated(name, text, LANGUAGES[language])
    if reason is not None:
        raise _LeftOut(f"it is generated: {reason}")
    return text


# --- where the files come from ------------------------------------------------------------------------------


@contextmanager
def _found(spec: SourceBenchmark) -> Iterator[_Found]:
    """A folder goes before a package of its name. Raises `BadInput`."""
    source = spec.source
    folder = Path(os.path.expanduser(source))
    if spec.revision is not None:
        if not folder.is_dir():
            raise BadInput(f"source {source!r} is not a folder, so it has no revision {spec.revision!r}; correct it.")
        with files_at(folder, spec.revision) as blobs:
            yield _at_revision(blobs)
    elif folder.is_dir():
        tracked = tracked_files(folder)
        yield _below(folder) if tracked is None else _of_names(folder, tracked)
    elif folder.exists():
        raise BadInput(f"source {source!r} is not a folder; give the folder that holds it.")
    elif not all(part.isidentifier() for part in source.split(".")):
        raise BadInput(f"source {source!r}: there is no such folder; correct the path.")
    else:
        yield _of_package(source)


def _at_revision(blobs: dict[str, Blob]) -> _Found:
    def read(name: str) -> bytes:
        blob = blobs[name]
        if blob.is_link:
            raise _LeftOut(_LINK)
        content = blob.read()
        _check_size(len(content))
        return content

    return _Found([name for name in blobs if _may_be_source(name)], read)


def _of_names(root: Path, names: list[str]) -> _Found:
    return _Found([name for name in names if _may_be_source(name)], lambda name: _read(root / name))


def _may_be_source(name: str) -> bool:
    """Whether none of the folders on the way to a file is one that is not looked into."""
    folders = PurePosixPath(name).parts[:-1]
    return not any(part.startswith(".") or part in _NOT_SOURCE for part in folders)


def _below(root: Path) -> _Found:
    found: list[Path] = []
    passed_over: dict[str, str] = {}

    def name(path: Path) -> str:
        return path.relative_to(root).as_posix()

    def unreadable(error: OSError) -> None:
        passed_over[name(Path(error.filename))] = "the folder cannot be read"

    for folder, subfolders, files in os.walk(root, onerror=unreadable):
        at = Path(folder)
        links = [one for one in subfolders if (at / one).is_symlink()]
        passed_over |= {name(at / one): _LINK for one in links}
        subfolders[:] = [one for one in subfolders if one not in links and _may_hold_source(at / one)]
        found += [at / one for one in files]
    return _Found([name(path) for path in found], lambda name: _read(root / name), passed_over)


def _may_hold_source(folder: Path) -> bool:
    hidden = folder.name.startswith(".")
    return not (hidden or folder.name in _NOT_SOURCE or (folder / "pyvenv.cfg").exists())


def _read(path: Path) -> bytes:
    if path.is_symlink():
        raise _LeftOut(_LINK)
    if not path.is_file():
        raise _LeftOut("it is not there" if not path.exists() else "it is not a regular file")
    _check_size(path.stat().st_size)
    return path.read_bytes()


def _check_size(size: int) -> None:
    if size > LARGEST_FILE:
        raise _LeftOut(f"it has {size:,} bytes, more than {LARGEST_FILE:,}")


def _of_package(name: str) -> _Found:
    top, *inner = name.split(".")
    package = importlib.util.find_spec(top)  # a dotted name would import its parents
    folders = list(package.submodule_search_locations or []) if package else []
    if package and not folders and not inner and package.has_location and package.origin:
        module = Path(package.origin)
        return _of_names(module.parent, [module.name])
    return _below(package_folder(name))


def package_folder(name: str, field: str = "source") -> Path:
    """Of an installed package, or of one within it (`package.inner`). Raises `BadInput`, which names the field."""
    top, *inner = name.split(".")
    package = importlib.util.find_spec(top) if top.isidentifier() else None
    folders = list(package.submodule_search_locations or []) if package else []
    if len(folders) > 1:
        raise BadInput(f"{field} {name!r} is spread over several folders; give one of them: {', '.join(folders)}.")
    root = Path(folders[0], *inner) if folders else None
    if root is None and package and not inner:
        raise BadInput(f"{field} {name!r} is compiled into Python and has no source files; name another package.")
    if root is None or not root.is_dir():
        raise BadInput(f"{field} {name!r}: there is no such folder and no such installed package{_nearest(top)}")
    return root


def _nearest(name: str) -> str:
    near = get_close_matches(name, {*packages_distributions(), *sys.stdlib_module_names}, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else "; correct the name or install it."
