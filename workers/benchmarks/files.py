"""Finding source files: below a folder, or in an installed package, which is found but never imported."""

import importlib.util
import os
import sys
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import packages_distributions
from pathlib import Path

from engine.errors import BadInput
from engine.languages import LARGEST_FILE, LONGEST_LINE
from workers.benchmarks.lines import Language

_NOT_SOURCE = {"__pycache__", "node_modules"}


@dataclass(frozen=True)
class SourceFiles:
    """The text of each file by its path relative to the root, in the order of those paths.

    Line ends are line feeds, whatever the checkout made of them.
    """

    texts: dict[str, str]
    left_out: list[str] = field(default_factory=list)  #: a sentence for each file passed over


def read_source(source: str, language: Language) -> SourceFiles:
    """The files of a language in a folder or installed package.

    Hidden folders, virtual environments, `node_modules` and caches are not looked into, and symbolic links are never
    followed: what they point to counts where it lies. Raises `BadInput` when there is no such folder or package.
    """
    root, names = _locate(source, language)
    texts, left_out = {}, []
    for name in sorted(names):
        try:
            texts[name] = _read(root / name)
        except _LeftOut as reason:
            left_out.append(f"{ascii(name)[1:-1]} is left out: {reason}.")
    return SourceFiles(texts, left_out)


class _LeftOut(Exception):
    """Why a file is passed over."""


def _read(path: Path) -> str:
    try:
        _check_kind(path)
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise _LeftOut(f"it cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise _LeftOut(f"byte {error.start + 1} is not UTF-8") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        raise _LeftOut("it holds null characters")
    if not text.strip():
        raise _LeftOut("it is empty")
    longest = max(map(len, text.split("\n")))
    if longest > LONGEST_LINE:
        raise _LeftOut(f"its longest line has {longest:,} characters, more than {LONGEST_LINE:,}")
    return text


def _check_kind(path: Path) -> None:
    if path.is_symlink():
        raise _LeftOut("it is a symbolic link, and links are not followed")
    if path.is_dir():
        raise _LeftOut("the folder cannot be read")
    if not path.is_file():
        raise _LeftOut("it is not a regular file")
    if path.stat().st_size > LARGEST_FILE:
        raise _LeftOut(f"it has {path.stat().st_size:,} bytes, more than {LARGEST_FILE:,}")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise _LeftOut("its name is not UTF-8") from None


def _locate(source: str, language: Language) -> tuple[Path, list[str]]:
    """The root, and the names below it of the files and links to judge. A folder goes before a package of its name."""
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        return folder, _names_below(folder, language)
    if folder.exists():
        raise BadInput(f"source {source!r} is not a folder; give the folder that holds it.")
    if not all(part.isidentifier() for part in source.split(".")):
        raise BadInput(f"source {source!r}: there is no such folder; correct the path.")
    return _locate_package(source, language)


def _names_below(root: Path, language: Language) -> list[str]:
    found: list[Path] = []  # files of the language, links to folders
    unreadable: list[OSError] = []
    for folder, subfolders, files in os.walk(root, onerror=unreadable.append):
        at = Path(folder)
        links = [name for name in subfolders if (at / name).is_symlink()]
        subfolders[:] = [name for name in subfolders if name not in links and _may_hold_source(at / name)]
        wanted = [name for name in files if Path(name).suffix.lower() in language.extensions]
        found += [at / name for name in links + wanted]
    found += [Path(error.filename) for error in unreadable]
    return [path.relative_to(root).as_posix() for path in found]


def _may_hold_source(folder: Path) -> bool:
    hidden = folder.name.startswith(".")
    return not (hidden or folder.name in _NOT_SOURCE or (folder / "pyvenv.cfg").exists())


def _locate_package(name: str, language: Language) -> tuple[Path, list[str]]:
    top, *inner = name.split(".")
    package = importlib.util.find_spec(top)  # a dotted name would import its parents
    folders = list(package.submodule_search_locations or []) if package else []
    if package and not folders and not inner and package.has_location and package.origin:
        module = Path(package.origin)
        return module.parent, [module.name] if module.suffix in language.extensions else []
    if len(folders) > 1:
        raise BadInput(f"source {name!r} is spread over several folders; give one of them: {', '.join(folders)}.")
    root = Path(folders[0], *inner) if folders else None
    if root is None and package and not inner:
        raise BadInput(f"source {name!r} is compiled into Python and has no source files; name another package.")
    if root is None or not root.is_dir():
        raise BadInput(f"source {name!r}: there is no such folder and no such installed package{_nearest(top)}")
    return root, _names_below(root, language)


def _nearest(name: str) -> str:
    near = get_close_matches(name, {*packages_distributions(), *sys.stdlib_module_names}, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else "; correct the name or install it."
