"""Benchmarks cut out of source code. A sample's source group is its file's path relative to the root."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from typing import Any, Protocol

from workers.benchmarks.draw import choose, draw
from workers.benchmarks.ends import Ends, cut
from workers.benchmarks.files import SourceFiles
from workers.benchmarks.lines import language_named, substantive_lines
from workers.benchmarks.sample import Sample
from workers.benchmarks.spec import SourceBenchmark
from workers.benchmarks.syntax import GRAMMARS, Body, Code, check_grammar

#: a prompt has at most this many characters, and begins where a line begins
LONGEST_PROMPT = 4_000
#: a longer reference is nobody's completion
LONGEST_REFERENCE = 4_000
#: what is looked at behind a function to see that it ends where its completion would
_BEHIND = 400
#: random-cut: tokens of a window, and the earliest cut of a whole one (Sun et al., ICSE 2024)
WINDOW = 128
EARLIEST_CUT = 50

_NOTHING_LEFT = re.compile(r"[\])}>;,:\s]*")


class Tokenizer(Protocol):
    """What random-cut asks of a Hugging Face fast tokenizer: where in a text each token begins and ends."""

    def __call__(
        self, text: str, *, add_special_tokens: bool, return_offsets_mapping: bool, verbose: bool
    ) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class _Cut:
    """A place in a file to cut at."""

    at: int  #: in characters
    name: str  #: of the sample, within its file
    end: int | None = None  #: where the reference has to end, where the syntax says so


def cut_samples(spec: SourceBenchmark, files: SourceFiles) -> tuple[list[Sample], list[str]]:
    """The samples of every task but random-cut, each named by file and line, and a sentence for each reason why a
    drawn place makes none.

    Of what stands before the cut the last lines are the prompt, as many as fit into `LONGEST_PROMPT` characters.
    """
    if spec.task in _BY_SYNTAX:
        for language in sorted({*files.languages.values()}):
            check_grammar(language, spec.task)

    @cache
    def file(name: str) -> "_File":
        return _File(name, files.texts[name], files.languages[name])

    @cache
    def cuts(name: str) -> list[Any]:
        return _PLACES[spec.task](file(name))

    drawn = draw(list(files.texts), lambda name: len(cuts(name)), spec.samples, spec.seed)
    samples, left_out = [], dict[str, list[str]]()
    for name, index in drawn:
        place = _CUTS[spec.task](file(name), cuts(name)[index], spec.seed)
        made = file(name).sample(place, spec.end)
        if isinstance(made, Sample):
            samples.append(made)
        else:
            left_out.setdefault(made, []).append(f"{name}:{place.name}")
    return samples, [_sentence(reason, names) for reason, names in sorted(left_out.items())]


def _sentence(reason: str, names: list[str]) -> str:
    return (
        f"{len(names):,} drawn place{'s' * (len(names) > 1)} made no sample, {ascii(names[0])[1:-1]} first: {reason}."
    )


class _File:
    """One file, its lines, and what can be asked for of it."""

    def __init__(self, name: str, text: str, language: str) -> None:
        self.name = name
        self.text = text
        self.language = language
        self.lines = text.split("\n")
        self.starts = list(accumulate((len(line) + 1 for line in self.lines), initial=0))

    @cached_property
    def code(self) -> Code:
        return Code(self.text, self.language)

    @cached_property
    def with_context(self) -> list[int]:
        """The substantive lines that something stands before."""
        first = next(index for index, line in enumerate(self.lines) if line.strip())
        return [line for line in substantive_lines(self.lines, language_named(self.language)) if line > first]

    def rests(self, line: int) -> list[int]:
        """Where a line may be cut, so that code stands on both sides."""
        start, end = self.starts[line], self.starts[line] + len(self.lines[line])
        return [at for at in self.code.places(start, end) if not _NOTHING_LEFT.fullmatch(self.text[at:end])]

    def sample(self, place: _Cut, ends: Ends) -> Sample | str:
        """What is cut there, or the reason why it is no sample."""
        prompt = self.text[self._prompt_start(place.at, whole_lines_do=ends == "line") : place.at]
        most = LONGEST_REFERENCE + _BEHIND if place.end is None else place.end - place.at + _BEHIND
        rest = self.text[place.at : place.at + most]
        reference = cut(prompt, rest, ends, self.language)
        if not reference.strip():
            return f"nothing is left of the reference up to the end of its {ends}"
        if place.end is not None and reference != self.text[place.at : place.end].rstrip():
            return "where the function ends cannot be told from its text alone"
        if len(reference) > LONGEST_REFERENCE:
            return f"its reference has more than {LONGEST_REFERENCE:,} characters"
        return Sample(f"{self.name}:{place.name}", prompt, reference, self.language, self.name)

    def _prompt_start(self, end: int, *, whole_lines_do: bool) -> int:
        """Where a line begins; and not in a string or comment, which an end that reads the prompt takes for code."""
        earliest = end - LONGEST_PROMPT
        if earliest <= 0:
            return 0
        start = self.text.find("\n", earliest - 1, end) + 1 or earliest
        if whole_lines_do or self.language not in GRAMMARS:
            return start
        later = (one for one in self.starts if start <= one < end and not self.code.begins_in_string(one))
        return next(later, start)


# --- where each task cuts -----------------------------------------------------------------------------------


def _lines_in_functions(file: _File) -> list[int]:
    inside = {line for body in file.code.bodies() for line in range(body.first_line, body.last_line + 1)}
    return [line for line in file.with_context if line in inside and not file.code.begins_in_string(file.starts[line])]


def _lines_with_a_rest(file: _File) -> list[int]:
    return [line for line in file.with_context if file.rests(line)]


def _before_line(file: _File, line: int, seed: int) -> _Cut:
    return _Cut(file.starts[line], str(line + 1))


def _within_line(file: _File, line: int, seed: int) -> _Cut:
    places = file.rests(line)
    at = places[choose(0, len(places) - 1, seed, file.name, line)]
    return _Cut(at, f"{line + 1}:{at - file.starts[line] + 1}")


def _before_body(file: _File, body: Body, seed: int) -> _Cut:
    return _Cut(body.start, str(body.first_line + 1), body.end)


#: by task, what is drawn from of a file, and where what was drawn is cut
_PLACES: dict[str, Callable[[_File], list[Any]]] = {
    "next-line": lambda file: file.with_context,
    "line-rest": _lines_with_a_rest,
    "single-line-infill": _lines_in_functions,
    "function-body": lambda file: file.code.bodies(),
}
_CUTS: dict[str, Callable[[_File, Any, int], _Cut]] = {
    "next-line": _before_line,
    "line-rest": _within_line,
    "single-line-infill": _before_line,
    "function-body": _before_body,
}
_BY_SYNTAX = frozenset({"line-rest", "single-line-infill", "function-body"})


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
        return Sample(f"{name}:{index}", prompt, reference, files.languages[name], name)

    places = draw(list(files.texts), windows, spec.samples, spec.seed)
    return [cut for cut in (sample(name, index) for name, index in places) if cut.prompt and cut.reference]


def _token_ends(tokenizer: Tokenizer, text: str) -> list[int]:
    """Where in the text each token ends, in characters; never falling.

    Offsets rather than decoded text, so that prompt and reference are the file's own characters. A character spread
    over several tokens belongs to the first of them.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [end for _, end in encoded["offset_mapping"]]
