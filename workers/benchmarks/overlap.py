"""What of a benchmark stands in a corpus: a model that learned from the corpus may know it by heart.

A sample is flagged where a run of twelve tokens that reaches into its reference stands in the corpus. Its prompt alone
flags nothing: a licence or an import is everywhere.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.errors import BadInput
from engine.shingles import LENGTH, Hashes, shingles, token_ends
from workers.benchmarks.files import package_folder
from workers.benchmarks.jsonl import records_of
from workers.benchmarks.records import LeftOut
from workers.benchmarks.sample import Sample

#: of a prompt only so many last characters can be in a run with the reference
_BEFORE = 2_000
#: a larger file is data, not something that a model was taught from as it stands
_LARGEST = 64 << 20
_RECORDS = (".jsonl", ".jsonl.gz", ".json", ".json.gz")


@dataclass(frozen=True)
class Flagged:
    """A sample that the corpus has a part of."""

    position: int  #: in the benchmark's order
    name: str
    shared: int  #: runs of twelve tokens that the corpus has
    runs: int  #: of these that the sample has
    found_in: str  #: the first place of the corpus


@dataclass(frozen=True)
class Overlap:
    """What came out of looking for a benchmark in a corpus."""

    corpus: str
    texts: int  #: files and records that were looked at
    characters: int
    judged: int  #: samples with twelve tokens up to the end of their reference; nothing can be said of the others
    flagged: list[Flagged]  #: in the benchmark's order


def overlap(samples: Sequence[Sample], corpus: str) -> Overlap:
    """Look for samples in a folder, a file of JSON lines or an installed package. The corpus is gone through once, and
    memory grows with the samples only. Raises `BadInput` where there is no such corpus, or nothing in it.
    """
    reaching = [reaching_in(sample) for sample in samples]
    known = np.unique(np.concatenate([np.zeros(0, np.uint64), *reaching]))
    where = np.full(len(known), -1)
    names: list[str] = []
    texts = characters = 0
    for name, text in corpus_texts(corpus):
        texts, characters = texts + 1, characters + len(text)
        places = _among(shingles(text), known)
        fresh = places[where[places] < 0]
        if len(fresh):
            where[fresh] = len(names)
            names.append(name)
    if not texts:
        raise BadInput(f"corpus {corpus!r} has no text to look through; name one that has files or records.")
    flagged = []
    for position, (sample, runs) in enumerate(zip(samples, reaching, strict=True)):
        found = where[np.searchsorted(known, runs)] if len(runs) else np.zeros(0, np.int64)
        shared = found[found >= 0]
        if len(shared):
            flagged.append(Flagged(position, sample.name, len(shared), len(runs), names[int(shared.min())]))
    return Overlap(corpus, texts, characters, sum(bool(len(runs)) for runs in reaching), flagged)


def reaching_in(sample: Sample) -> Hashes:
    """Of the runs of twelve tokens in prompt and reference, those that end within the reference."""
    before = sample.prompt[-_BEFORE:]
    text = before + sample.reference
    return shingles(text)[_runs_before(text, len(before)) :]


def _runs_before(text: str, place: int) -> int:
    """How many runs end before a place in the text."""
    tokens = sum(end <= place for end in token_ends(text))
    return max(0, tokens - LENGTH + 1)


def _among(found: Hashes, known: Hashes) -> np.ndarray:
    """Where in `known`, which rises, those of `found` stand that are in it."""
    if not len(known):
        return np.zeros(0, np.int64)
    places = np.searchsorted(known, found)
    places[places == len(known)] = 0
    return np.unique(places[known[places] == found])


def corpus_texts(corpus: str) -> Iterator[tuple[str, str]]:
    """Every text of a corpus and where it stands. Raises `BadInput`."""
    path = Path(os.path.expanduser(corpus))
    if path.is_file():
        if not path.name.endswith(_RECORDS):
            raise BadInput(
                f"corpus {corpus!r} is not a file of JSON lines; give one, a folder or an installed package."
            )
        yield from _texts_of_records(str(path), path.name)
        return
    root = path if path.is_dir() else package_folder(corpus, field="corpus")
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(one for one in subfolders if one != ".git" and not (Path(folder) / one).is_symlink())
        for file in (Path(folder) / one for one in sorted(files)):
            name = file.relative_to(root).as_posix()
            if file.name.endswith(_RECORDS[:2]):
                yield from _texts_of_records(str(file), name)
            elif (text := _text(file)) is not None:
                yield name, text


def _texts_of_records(file: str, name: str) -> Iterator[tuple[str, str]]:
    for record in records_of(file):
        try:
            text = "\n".join(record.strings())
        except LeftOut:
            continue
        yield f"{name}, line {record.number}", text


def _text(file: Path) -> str | None:
    """None where the file is no text, or cannot be read."""
    try:
        if file.is_symlink() or not file.is_file() or file.stat().st_size > _LARGEST:
            return None
        content = file.read_bytes()
        return None if b"\0" in content[:8192] else content.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
