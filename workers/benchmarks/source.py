"""Benchmarks cut out of source code. A sample's source group is its file's path relative to the root."""

from collections.abc import Mapping
from functools import cache
from itertools import accumulate
from typing import Any, Protocol

from workers.benchmarks.draw import choose, draw
from workers.benchmarks.files import SourceFiles
from workers.benchmarks.lines import Language, language_named, substantive_lines
from workers.benchmarks.sample import Sample
from workers.benchmarks.spec import SourceBenchmark

#: a next-line prompt has at most this many characters, and begins where a line begins
LONGEST_PROMPT = 4_000
#: random-cut: tokens of a window, and the earliest cut of a whole one (Sun et al., ICSE 2024)
WINDOW = 128
EARLIEST_CUT = 50


class Tokenizer(Protocol):
    """What random-cut asks of a Hugging Face fast tokenizer: where in a text each token begins and ends."""

    def __call__(
        self, text: str, *, add_special_tokens: bool, return_offsets_mapping: bool, verbose: bool
    ) -> Mapping[str, Any]: ...


def next_line_samples(spec: SourceBenchmark, files: SourceFiles) -> list[Sample]:
    """Drawn substantive lines, each after what stands before it in its file, named `path:line number`.

    Of the prompt the last lines are kept, as many as fit into `LONGEST_PROMPT` characters.
    """
    language = language_named(spec.language)

    @cache
    def lines_of(name: str) -> "_Lines":
        return _Lines(files.texts[name], language)

    places = draw(list(files.texts), lambda name: len(lines_of(name).with_context), spec.samples, spec.seed)
    return [lines_of(name).sample(index, name, spec.language) for name, index in places]


class _Lines:
    """The lines of one file, and which of them can be asked for."""

    def __init__(self, text: str, language: Language) -> None:
        self._text = text
        self._lines = text.split("\n")
        self._starts = list(accumulate((len(line) + 1 for line in self._lines), initial=0))
        first = next(index for index, line in enumerate(self._lines) if line.strip())
        self.with_context = [index for index in substantive_lines(self._lines, language) if index > first]

    def sample(self, index: int, file: str, language: str) -> Sample:
        line = self.with_context[index]
        prompt = self._text[self._prompt_start(self._starts[line]) : self._starts[line]]
        return Sample(f"{file}:{line + 1}", prompt, self._lines[line], language, file)

    def _prompt_start(self, end: int) -> int:
        earliest = end - LONGEST_PROMPT
        return self._text.index("\n", earliest - 1) + 1 if earliest > 0 else 0


def random_cut_samples(spec: SourceBenchmark, files: SourceFiles, tokenizer: Tokenizer, length: int) -> list[Sample]:
    """SEC's protocol (Sun et al., ICSE 2024): drawn windows of 128 tokens of a file, each cut once, at a place that
    the seed fixes, named `path:window`.

    The prompt is what stands before the cut in the window, the reference the next `length` tokens (10 in the paper),
    fewer at the window's end. A file's last window may be shorter, but not as short as a reference. A cut that leaves
    no whole character on one side, which takes characters of several tokens, makes no sample.
    """

    @cache
    def ends(name: str) -> list[int]:
        return _token_ends(tokenizer, files.texts[name])

    def windows(name: str) -> int:
        whole, rest = divmod(len(ends(name)), WINDOW)
        return whole + (rest > length)

    def sample(name: str, index: int) -> Sample:
        edges = [0, *ends(name)][index * WINDOW : (index + 1) * WINDOW + 1]
        size = len(edges) - 1
        cut = choose(max(min(size - length, EARLIEST_CUT), 1), size - 1, spec.seed, name, index)
        text = files.texts[name]
        prompt, reference = text[edges[0] : edges[cut]], text[edges[cut] : edges[min(cut + length, size)]]
        return Sample(f"{name}:{index}", prompt, reference, spec.language, name)

    places = draw(list(files.texts), windows, spec.samples, spec.seed)
    return [cut for cut in (sample(name, index) for name, index in places) if cut.prompt and cut.reference]


def _token_ends(tokenizer: Tokenizer, text: str) -> list[int]:
    """Where in the text each token ends, in characters; never falling.

    Offsets rather than decoded text, so that prompt and reference are the file's own characters. A character spread
    over several tokens belongs to the first of them.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [end for _, end in encoded["offset_mapping"]]
