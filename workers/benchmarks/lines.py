"""Lines of source code: what a language's files are called, and which of their lines are worth completing."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from engine.errors import BadInput
from engine.languages import EXTENSIONS
from engine.registry import unknown

_ONLY_CLOSING = re.compile(r"[\])}][\])},;\s]*")


@dataclass(frozen=True)
class Language:
    extensions: frozenset[str]
    line_comments: tuple[str, ...]
    block_comments: bool  #: `/* … */`


#: how the languages comment that are not like C
_COMMENTS = {"php": ("//", "#"), "python": ("#",), "ruby": ("#",)}
LANGUAGES = {
    name: Language(extensions, _COMMENTS.get(name, ("//",)), block_comments=name not in ("python", "ruby"))
    for name, extensions in EXTENSIONS.items()
}


def language_named(name: str) -> Language:
    """Raises `BadInput` with the nearest known name."""
    if name not in LANGUAGES:
        raise BadInput(unknown("language", name, list(LANGUAGES)))
    return LANGUAGES[name]


def languages_by_extension(names: Iterable[str]) -> dict[str, str]:
    """The language of a file by its extension. `.h` is C's where C is among them. Raises `BadInput`."""
    found: dict[str, str] = {}
    for name in sorted(names):
        for extension in language_named(name).extensions:
            found.setdefault(extension, name)
    return found


def substantive_lines(lines: list[str], language: Language) -> list[int]:
    """Indices of the lines that are not blank, not a comment only and not only closing brackets.

    A block comment counts where it begins its line; text in a string literal, docstrings included, is code.
    """
    found = []
    in_block = False
    for index, line in enumerate(lines):
        code, in_block = _without_block_comments(line, in_block) if language.block_comments else (line, False)
        code = code.strip()
        if code and not code.startswith(language.line_comments) and not _ONLY_CLOSING.fullmatch(code):
            found.append(index)
    return found


def _without_block_comments(line: str, in_block: bool) -> tuple[str, bool]:
    """What is left of a line after the block comments at its beginning, and whether one is still open after it."""
    while in_block or line.lstrip().startswith("/*"):
        start = 0 if in_block else line.index("/*") + 2
        end = line.find("*/", start)
        if end < 0:
            return "", True
        line, in_block = line[end + 2 :], False
    return line, False
