"""Source code to learn from, cut into windows of tokens: files are drawn, near-duplicates and benchmarks left out."""

import hashlib
import math
import random
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from engine.errors import BadInput
from engine.languages import extensions_of
from engine.training.overlap import Benchmarks, Seen, shingles
from engine.training.sources import Source, check_apart, open_source
from engine.training.spec import CorpusSpec

Entry = dict[str, Any]  #: one source in the manifest
Tokenizer = Callable[[str], Any]


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
    #: a row a source: name, version, licence, files, bytes, tokens, hash over the windows, removed: [file, why] each
    manifest: list[Entry]

    @property
    def n_tokens(self) -> int:
        return sum(len(window.token_ids) for window in self.windows)


def read_corpora(
    spec: CorpusSpec, tokenizer: Tokenizer, benchmarks: Iterable[tuple[str, str]] = ()
) -> tuple[Corpus, Corpus]:
    """What is learned, and what is measured on: no project is in both. Raises `BadInput` where either is empty.

    benchmarks: name and text of everything that must not be learned.
    """
    check_apart(spec.corpus, spec.holdout)
    extensions = extensions_of(spec.languages)
    with ExitStack() as opened:
        sources = [opened.enter_context(open_source(name, extensions)) for name in spec.corpus]
        kept_sources = [opened.enter_context(open_source(name, extensions)) for name in spec.holdout]
        return _read(spec, tokenizer, Benchmarks(benchmarks), sources, kept_sources)


def _read(
    spec: CorpusSpec, tokenizer: Tokenizer, benchmarks: Benchmarks, sources: list[Source], kept_sources: list[Source]
) -> tuple[Corpus, Corpus]:
    projects = set() if kept_sources else _projects_apart(spec, sources)
    apart = Seen()
    apart_sources = kept_sources or sources

    def is_apart(project: str) -> bool:
        return not projects or project in projects

    kept = _Reader(spec, tokenizer, Benchmarks(()), Seen()).read(
        apart_sources, spec.holdout_tokens, "holdout", is_apart
    )
    for source in apart_sources:  # all of it, drawn or not: other packages may carry copies
        for number, project in enumerate(source.projects):
            document = source.read(number) if is_apart(project) else None
            if document is not None:
                apart.add(f"{source.name}/{document.name}, which is held out", shingles(document.text))
    reader = _Reader(spec, tokenizer, benchmarks, apart)
    return reader.read(sources, spec.tokens, "corpus", lambda project: project not in projects), kept


class _Reader:
    """Draws windows out of sources, never the same code twice, and nothing that was seen before."""

    def __init__(self, spec: CorpusSpec, tokenizer: Tokenizer, benchmarks: Benchmarks, seen: Seen) -> None:
        self.spec, self.tokenizer, self.benchmarks, self.seen = spec, tokenizer, benchmarks, seen

    def read(self, sources: list[Source], tokens: int, field: str, belongs: Callable[[str], bool]) -> Corpus:
        """Windows from all sources in equal shares; what one cannot fill, those after it do."""
        windows: list[Window] = []
        manifest: list[Entry] = []
        for done, source in enumerate(sources):
            share = (tokens - sum(len(w.token_ids) for w in windows)) // (len(sources) - done)
            mine, entry = self._draw(source, share, belongs)
            windows += mine
            manifest.append(entry)
        if not windows:
            raise BadInput(_why_empty(field, self.spec, manifest))
        random.Random(f"{self.spec.seed} order").shuffle(windows)
        return Corpus(windows, manifest)

    def _draw(self, source: Source, share: int, belongs: Callable[[str], bool]) -> tuple[list[Window], Entry]:
        draw = random.Random(f"{self.spec.seed} {source.name}")
        numbers = [number for number, project in enumerate(source.projects) if belongs(project)]
        draw.shuffle(numbers)
        windows: list[Window] = []
        removed: list[tuple[str, str]] = []
        short, size, left = 0, 0, share
        for number in numbers:
            if left < self.spec.context:
                break
            document = source.read(number)
            ids = [] if document is None else self.tokenizer(document.text)["input_ids"]
            if document is None or len(ids) < self.spec.context:
                short += 1
                continue
            why = self._why_not(f"{source.name}/{document.name}", document.text)
            if why is not None:
                removed.append((document.name, why))
                continue
            places = list(range(0, len(ids) - self.spec.context + 1, self.spec.context))
            for start in draw.sample(places, min(len(places), self.spec.windows_per_file, left // self.spec.context)):
                windows.append(Window(ids[start : start + self.spec.context], source.name, document.name))
                left -= self.spec.context
            size += len(document.text.encode())
        return windows, _entry(source, windows, size, short, removed)

    def _why_not(self, name: str, text: str) -> str | None:
        found = shingles(text)
        overlapped = self.benchmarks.overlap(found)
        if overlapped is not None:
            return f"overlaps {overlapped}"
        twin = self.seen.duplicate_of(found)
        if twin is not None:
            return f"near-duplicate of {twin}"
        self.seen.add(name, found)
        return None


def _projects_apart(spec: CorpusSpec, sources: list[Source]) -> set[str]:
    """Projects that are measured on where no holdout is named: whole ones, drawn by their names. Raises `BadInput`."""
    projects = sorted({project for source in sources for project in source.projects})
    count = math.ceil(spec.holdout_share * len(projects))
    if not 0 < count < len(projects):
        raise BadInput(
            f"holdout: nothing is named, and {spec.holdout_share:g} of the corpus's {len(projects)} projects leaves "
            "none to learn from or none to measure on; name folders or packages in holdout."
        )
    return set(sorted(projects, key=lambda project: _rank(spec.seed, project))[:count])


def _rank(seed: int, project: str) -> str:
    return hashlib.sha256(f"{seed} {project}".encode()).hexdigest()


def _entry(source: Source, windows: list[Window], size: int, short: int, removed: list[tuple[str, str]]) -> Entry:
    content = hashlib.sha256()
    for window in windows:
        content.update(repr((window.file, window.token_ids)).encode())
    return {
        "source": source.name,
        "version": source.version,
        "licence": source.licence,
        "files": len({window.file for window in windows}),
        "bytes": size,
        "tokens": sum(len(window.token_ids) for window in windows),
        "sha256": content.hexdigest(),
        "too_short": short,
        "removed": removed,
    }


def _why_empty(field: str, spec: CorpusSpec, manifest: list[Entry]) -> str:
    reasons = [why for entry in manifest for _, why in entry["removed"]]
    overlapping = sum(why.startswith("overlaps") for why in reasons)
    return (
        f"{field}: nothing is left of {', '.join(entry['source'] for entry in manifest)}: "
        f"{sum(entry['too_short'] for entry in manifest)} files are no {' or '.join(spec.languages)} of {spec.context} "
        f"tokens or more, {overlapping} overlap a benchmark, {len(reasons) - overlapping} are near-duplicates; "
        "add sources or lower context."
    )
