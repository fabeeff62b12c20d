"""Source code to learn from: files of folders and installed packages, cut into windows of tokens."""

import hashlib
import random
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine.errors import BadInput
from engine.training.spec import TrainSpec

Entry = dict[str, Any]  #: one source in the manifest


@dataclass(frozen=True)
class Window:
    """A run of tokens out of one file."""

    token_ids: list[int]
    source: str
    file: str


@dataclass(frozen=True)
class Corpus:
    """Windows to learn from, and what they came from."""

    windows: list[Window]
    manifest: list[Entry]  #: a row a source: name, version, files, tokens, hash over the windows

    @property
    def n_tokens(self) -> int:
        return sum(len(window.token_ids) for window in self.windows)


def read_corpus(sources: list[str], tokens: int, spec: TrainSpec, tokenizer) -> Corpus:  # type: ignore[no-untyped-def]
    """Windows from all sources in equal shares, files drawn with the seed. Raises `BadInput` where nothing is left."""
    windows: list[Window] = []
    manifest: list[Entry] = []
    for source in sources:
        # What one source cannot fill, the sources after it do.
        share = (tokens - sum(len(w.token_ids) for w in windows)) // (len(sources) - len(manifest))
        mine = _windows(source, share, spec, tokenizer)
        windows += mine
        manifest.append(_entry(source, mine))
    if not windows:
        raise BadInput(f"corpus: no Python file of {spec.context} tokens or more in {', '.join(sources)}; add sources.")
    random.Random(f"{spec.seed} order").shuffle(windows)
    return Corpus(windows, manifest)


def source_folder(source: str) -> Path:
    """A folder as given, or the folder of an installed package, which is not imported. Raises `BadInput`."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    found = find_spec(source) if source.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise BadInput(
            f"corpus: {source!r} is neither a folder nor an installed package; correct it or install the package."
        )
    return Path(found.submodule_search_locations[0])


def check_apart(corpus: list[str], holdout: list[str]) -> None:
    """What is measured must not have been learned. Raises `BadInput`."""
    folders = {source: source_folder(source).resolve() for source in [*corpus, *holdout]}
    for learned in corpus:
        for kept in holdout:
            one, other = folders[learned], folders[kept]
            if one == other or one in other.parents or other in one.parents:
                raise BadInput(f"holdout: {kept!r} overlaps the corpus source {learned!r}; keep them apart.")


def _windows(source: str, share: int, spec: TrainSpec, tokenizer) -> list[Window]:  # type: ignore[no-untyped-def]
    folder = source_folder(source)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if path.is_file())
    draw = random.Random(f"{spec.seed} {source}")
    draw.shuffle(files)
    windows: list[Window] = []
    left = share
    for file in files:
        if left < spec.context:
            break
        try:
            ids = tokenizer((folder / file).read_text(encoding="utf-8"))["input_ids"]
        except (OSError, UnicodeDecodeError):
            continue
        places = list(range(0, len(ids) - spec.context + 1, spec.context))
        for start in draw.sample(places, min(len(places), spec.windows_per_file, left // spec.context)):
            windows.append(Window(ids[start : start + spec.context], source, file))
            left -= spec.context
    return windows


def _entry(source: str, windows: list[Window]) -> Entry:
    content = hashlib.sha256()
    for window in windows:
        content.update(repr((window.file, window.token_ids)).encode())
    return {
        "source": source if not Path(source).is_dir() else Path(source).name,
        "version": _version(source),
        "files": len({window.file for window in windows}),
        "tokens": sum(len(window.token_ids) for window in windows),
        "sha256": content.hexdigest(),
    }


def _version(source: str) -> str | None:
    try:
        return version(source)
    except (PackageNotFoundError, ValueError):
        return None
