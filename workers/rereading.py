"""Texts that the record does not keep (`store_text: false`): read again by the worker, and held against the hash."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from socket import gethostname

from db.records import SampleRow
from engine.errors import BadInput
from engine.loading import load_tokenizer
from workers.benchmarks.catalogue import load_benchmark
from workers.benchmarks.sample import Sample
from workers.benchmarks.spec import parse_benchmark
from workers.pinned import Pinned


class Texts:
    """The one benchmark without stored texts that a worker has read last."""

    def __init__(self) -> None:
        self._hash: str | None = None
        self._samples: list[Sample] = []

    def restored(self, samples: Sequence[SampleRow], content_hash: str, pinned: Pinned) -> list[SampleRow]:
        """The samples with their prompts, references and tests, where the record does not have them.

        Raises `BadInput` where the source is not on this machine, or is not what the job was prepared with.
        """
        if content_hash not in pinned.withheld:
            return list(samples)
        if self._hash != content_hash:
            self._read(content_hash, pinned)
        texts = (self._samples[sample.position] for sample in samples)
        return [
            replace(sample, prompt=text.prompt, reference=text.reference, test=text.test)
            for sample, text in zip(samples, texts, strict=True)
        ]

    def _read(self, content_hash: str, pinned: Pinned) -> None:
        asked = parse_benchmark(pinned.withheld[content_hash])
        benchmark = load_benchmark(
            asked, tokenizer_of=partial(load_tokenizer, pinned.model), max_new_tokens=pinned.max_new_tokens
        )
        if benchmark.content_hash != content_hash:
            raise BadInput(
                f"benchmark {benchmark.name!r} keeps no text in the record, and on {gethostname()} it has changed: its "
                f"content hash was {content_hash[:12]} and is {benchmark.content_hash[:12]}; bring its source back as "
                "it was (a revision stays as it is), or submit the job again."
            )
        self._hash, self._samples = content_hash, benchmark.samples
