"""What a benchmark is made of."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field, replace
from itertools import chain


@dataclass(frozen=True)
class Sample:
    """One thing to complete, and what stood there."""

    name: str  #: stable id, unique within its benchmark
    prompt: str
    reference: str
    language: str
    source_group: str  #: file, task or repository it was taken from: samples of one group are not independent
    #: the program that passes behind prompt, completion and a newline, where completions can be executed
    test: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """An ordered list of samples under a name and a version."""

    name: str
    version: str
    ends: str  #: where a completion ends, see `workers.benchmarks.ends`; the references end there too
    samples: list[Sample]
    left_out: list[str] = field(default_factory=list)  #: a sentence for each piece of input that was passed over
    store_text: bool = True  #: whether the record may have the samples' texts

    @property
    def recorded(self) -> list[Sample]:
        """The samples as the record has them: with hashes for texts where those are not to be stored."""
        return self.samples if self.store_text else [withheld(sample) for sample in self.samples]

    @property
    def content_hash(self) -> str:
        """See `content_hash`. Of what is recorded, so that it can be checked there; hence another without the texts."""
        return content_hash(self.version, self.ends, self.recorded)


def withheld(sample: Sample) -> Sample:
    """The sample with a hash in place of each text."""
    return replace(
        sample,
        prompt=text_hash(sample.prompt),
        reference=text_hash(sample.prompt, sample.reference),
        test=None if sample.test is None else text_hash(sample.prompt, sample.test),
    )


def text_hash(*texts: str) -> str:
    """What stands for a text that is not stored. The prompt is hashed in front of what stands behind it: a short line
    alone would soon be guessed. A completion that equals the reference has the same hash.
    """
    whole = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        whole.update(len(encoded).to_bytes(8, "big") + encoded)
    return f"sha256:{whole.hexdigest()}"


def content_hash(version: str, ends: str, samples: Iterable[Sample]) -> str:
    """SHA-256 (hex) over the version, the end and every field of every sample, in order."""
    # as it was written when an end was that of the line or none: those hashes stay
    end = {"line": True, "text": False}.get(ends, ends)
    return _digest(chain([[version, end]], map(_fields, samples)))


def content_version(recipe: str, samples: Iterable[Sample]) -> str:
    """The version of a benchmark that promises no fixed content: how it was made, and what came out of it."""
    return f"{recipe}-{_digest(map(_fields, samples))[:12]}"


def _fields(sample: Sample) -> tuple[str | None, ...]:
    """A test that is not there does not change the hash."""
    fields = astuple(sample)
    return fields[:-1] if sample.test is None else fields


def _digest(rows: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode("ascii") + b"\n")
    return digest.hexdigest()
