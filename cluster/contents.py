"""How what the record keeps by its hash is hashed: the record itself does not know."""

from collections.abc import Iterable

from db.checks import Hashes
from db.records import SampleRow
from workers.benchmarks.sample import Sample, content_hash
from workers.bundle import packed_hash


def hashes() -> Hashes:
    """What `db.checks` and `db.importing` hold content against."""
    return Hashes(benchmark=_benchmark, artifact=lambda kind, content: packed_hash(content))


def _benchmark(version: str, ends: str, samples: Iterable[SampleRow]) -> str:
    read = (Sample(one.name, one.prompt, one.reference, one.language, one.source_group, one.test) for one in samples)
    return content_hash(version, ends, read)
