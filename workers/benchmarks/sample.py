"""What a benchmark is made of."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from itertools import chain


@dataclass(frozen=True)
class Sample:
    """One thing to complete, and what stood there."""

    name: str  #: stable id, unique within its benchmark
    prompt: str
    reference: str
    language: str
    source_group: str  #: file, task or repository it was taken from: samples of one group are not independent


@dataclass(frozen=True)
class Benchmark:
    """An ordered list of samples under a name and a version."""

    name: str
    version: str
    ends_with_line: bool  #: whether a completion ends with its line
    samples: list[Sample]
    left_out: list[str] = field(default_factory=list)  #: a sentence for each piece of input that was passed over

    @property
    def content_hash(self) -> str:
        """See `content_hash`."""
        return content_hash(self.version, self.ends_with_line, self.samples)


def content_hash(version: str, ends_with_line: bool, samples: Iterable[Sample]) -> str:
    """SHA-256 (hex) over the version, `ends_with_line` and every field of every sample, in order."""
    return _digest(chain([[version, ends_with_line]], map(astuple, samples)))


def content_version(recipe: str, samples: Iterable[Sample]) -> str:
    """The version of a benchmark that promises no fixed content: how it was made, and what came out of it."""
    return f"{recipe}-{_digest(map(astuple, samples))[:12]}"


def _digest(rows: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode("ascii") + b"\n")
    return digest.hexdigest()
