"""Where a completion ends, told from the text alone: the same for every policy, and for the reference.

The prompt is read with it: a string, a bracket or a block that is open there is still open in the completion. What is
looked at is code; strings and comments are passed over.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from engine.errors import BadInput
from engine.registry import unknown

#: line: the first newline. statement: its last line, or its semicolon or opening brace. block: the block that the
#: completion stands in, by indentation in Python, by brace elsewhere, the brace included. function: the innermost
#: function that is open in the prompt. text: whatever was written.
Ends = Literal["line", "statement", "block", "function", "text"]
ENDS: tuple[Ends, ...] = get_args(Ends)

#: blocks are told by indentation and brackets join lines; in the others braces make the blocks
_BY_INDENTATION = frozenset({"python"})
#: a statement ends where its line does, unless a semicolon ended it before
_BY_LINE = frozenset({"python", "ruby", "go", "kotlin", "javascript", "typescript"})
#: a line that begins with # is a statement
_PREPROCESSED = frozenset({"c", "cpp", "csharp"})

_PAIRS = {")": ("(",), "]": ("[",), "}": ("{", "block")}
#: before a brace that begins a value: an object, an initialiser
_BEFORE_VALUE = re.compile(r"(?:(?<![=<>!])=|[(,?:\[\]]|\breturn)\s*$")
_UNFINISHED_LINE = re.compile(r"(?:\\|[-+*/%=&|^<>?:,.])\s*$")
_DEF = re.compile(r"^([ \t]*)(?:async[ \t]+)?def\b", re.MULTILINE)
#: before the brace of a function: a parameter list, and what may stand between it and the brace
_HEAD = re.compile(r"\)\s*(?:(?:const|noexcept|override|final|throws|async|where|mut|->|:)(?:(?!=>)[^;{}])*)?$")
#: before that of a function without a name; in Rust and PHP the sign belongs to the arms of a match
_ARROW = {
    "javascript": re.compile(r"=>\s*$"),
    "typescript": re.compile(r"=>\s*$"),
    "csharp": re.compile(r"=>\s*$"),
    "java": re.compile(r"->\s*$"),
}
_NO_FUNCTION = re.compile(
    r"(?:^|[\s;{}])(?:if|for|while|switch|catch|else|match|with|synchronized|using|lock)\b[^;{}]*$"
    r"|\b(?:case|default)\b[^;{}]*->\s*$"
)


def parse_ends(value: str) -> Ends:
    """Raises `BadInput` with the nearest known end."""
    for known in ENDS:
        if value == known:
            return known
    raise BadInput(unknown("end", value, list(ENDS)))


@dataclass(frozen=True)
class _Sign:
    """One sign of code that means something to an end."""

    at: int
    what: str  #: a bracket, a semicolon, a newline, or `x` for anything else that is code
    end: int


def cut(prompt: str, completion: str, ends: Ends, language: str) -> str:
    """The completion up to its end, all of it where it reaches none.

    White space at its end goes with what was cut, except where nothing ends a completion or its line does.
    """
    if ends == "text":
        return completion
    if ends == "line":
        return completion.split("\n", 1)[0].removesuffix("\r")
    place = _PLACES[ends](prompt, prompt + completion, language)
    return (prompt + completion)[len(prompt) : place].rstrip()


def _end_of_statement(prompt: str, text: str, language: str) -> int:
    """Behind the first statement that has any code in the completion; before a brace that closes the block around."""
    opened: list[str] = []  # brackets, and `block` for a brace that is none
    code = False
    for sign in _signs(text, language):
        closes_block = sign.what == "}" and (not opened or opened[-1] == "block") and language not in _BY_INDENTATION
        _open_or_close(opened, _bracket(text, sign, language))
        if sign.at < len(prompt):
            continue
        if closes_block:
            return sign.at if code else sign.end
        code = code or sign.what not in ";\n"
        if code and _closes_statement(text, sign, opened, language):
            return sign.end
    return len(text)


def _open_or_close(opened: list[str], bracket: str) -> None:
    """Keep the brackets that are open; one that closes another kind than was opened closes what it can."""
    if bracket in ("(", "[", "{", "block"):
        opened.append(bracket)
    elif bracket in _PAIRS and any(one in _PAIRS[bracket] for one in opened):
        while opened.pop() not in _PAIRS[bracket]:
            pass


def _bracket(text: str, sign: _Sign, language: str) -> str:
    """The sign; `block` for a brace that opens one: not in Python, nor where a value is expected."""
    value = language in _BY_INDENTATION or _BEFORE_VALUE.search(text[max(0, sign.at - 40) : sign.at])
    return "block" if sign.what == "{" and not value else sign.what


def _closes_statement(text: str, sign: _Sign, opened: list[str], language: str) -> bool:
    if opened and opened[-1] != "block":
        return False
    if sign.what == "\n":
        line = _logical_line(text, sign.at)
        if language in _BY_INDENTATION or (language in _PREPROCESSED and line.lstrip().startswith("#")):
            return not line.endswith("\\")
        return language in _BY_LINE and not _UNFINISHED_LINE.search(line)
    return sign.what == ";" or (sign.what == "{" and language not in _BY_INDENTATION)


def _logical_line(text: str, end: int) -> str:
    """The line that ends there, with those before it that a backslash joins to it."""
    start = text.rfind("\n", 0, end) + 1
    while start > 1 and text[start - 2] == "\\":
        start = text.rfind("\n", 0, start - 1) + 1
    return text[start:end]


def _end_of_block(prompt: str, text: str, language: str) -> int:
    if language in _BY_INDENTATION:
        return _dedent(prompt, text, language, _own_indentation(prompt, text))
    return _closing_brace(prompt, text, language, len(_open_braces(prompt, language)))


def _end_of_function(prompt: str, text: str, language: str) -> int:
    """Of the innermost open function; where the prompt has none, of the file's outermost code."""
    if language in _BY_INDENTATION:
        heads = _DEF.findall(prompt)
        return _dedent(prompt, text, language, _width(heads[-1]) + 1 if heads else 1)
    braces = _open_braces(prompt, language)
    heads = [place for place, brace in enumerate(braces, start=1) if _is_function(prompt[:brace], language)]
    return _closing_brace(prompt, text, language, heads[-1] if heads else len(braces))


def _own_indentation(prompt: str, text: str) -> int:
    """Of the first line that the completion has a part of and that is not blank."""
    start = prompt.rfind("\n") + 1
    first = next((line for line in text[start:].split("\n") if line.strip()), "")
    return _width(first)


def _dedent(prompt: str, text: str, language: str, least: int) -> int:
    """The end of the last line with code before the first one, behind the cut, that is indented less than `least`.

    A comment between the two belongs to what follows.
    """
    fresh, has_code, last = False, False, None
    for sign in _signs(text, language, joined=True):
        if sign.what == "\n":
            fresh = sign.at >= len(prompt) - 1
            last = sign.at if has_code and sign.at >= len(prompt) else last
            has_code = False
            continue
        if fresh:
            fresh = False
            start = text.rfind("\n", 0, sign.at) + 1
            if start >= len(prompt) and _width(text[start:]) < least:
                return len(prompt) if last is None else last
        has_code = True
    return len(text)


def _closing_brace(prompt: str, text: str, language: str, depth: int) -> int:
    """Behind the brace that closes the `depth`-th of the open ones; without an open one, the end of the text."""
    if not depth:
        return len(text)
    open_braces = 0
    for sign in _signs(text, language):
        open_braces = max(0, open_braces + (sign.what == "{") - (sign.what == "}"))
        if sign.at >= len(prompt) and sign.what == "}" and open_braces < depth:
            return sign.end
    return len(text)


def _open_braces(prompt: str, language: str) -> list[int]:
    """Where the braces stand that the prompt leaves open, outermost first."""
    found: list[int] = []
    for sign in _signs(prompt, language):
        if sign.what == "{":
            found.append(sign.at)
        elif sign.what == "}" and found:
            found.pop()
    return found


def _is_function(head: str, language: str) -> bool:
    """Whether a brace behind this text opens the body of a function."""
    near = head[-400:]
    statement = re.split(r"[;{}]", near)[-1]
    arrow = language in _ARROW and _ARROW[language].search(near)
    return bool(arrow or _HEAD.search(near)) and _NO_FUNCTION.search(f" {statement}") is None


def _signs(text: str, language: str, *, joined: bool = False) -> Iterator[_Sign]:
    """The signs of the code. joined: without the newlines that an open bracket or a backslash makes white space."""
    depth = 0
    for found in _pattern(language).finditer(text):
        if found.lastgroup == "string":
            yield _Sign(found.start(), "x", found.end())
        if found.lastgroup != "sign":
            continue
        sign = _Sign(found.start(), _kind(found.group()), found.end())
        depth = max(0, depth + (sign.what in "([{") - (sign.what in ")]}"))
        if not (joined and sign.what == "\n" and (depth or text[: sign.at].endswith("\\"))):
            yield sign


def _kind(sign: str) -> str:
    return sign if sign in "()[]{};\n" else "x"


@cache
def _pattern(language: str) -> re.Pattern[str]:
    """Strings, comments, and the signs of code between them; an open string or comment reaches to the text's end."""
    if language in ("python", "ruby"):
        quoted = [r'"""(?:[^\\]|\\.)*?(?:"""|\Z)', r"'''(?:[^\\]|\\.)*?(?:'''|\Z)"]
        comments = [r"\#[^\n]*"]
    else:
        comments = [r"//[^\n]*", r"/\*.*?(?:\*/|\Z)"] + ([r"\#[^\n]*"] if language == "php" else [])
        quoted = [r"`(?:[^\\`]|\\.)*(?:`|\Z)"] if language in ("javascript", "typescript", "go") else []
    quoted.append(r'"(?:[^"\\\n]|\\.)*(?:"|(?=\n)|\Z)')
    # a lone quote in Rust marks a lifetime
    quoted.append(r"'(?:[^'\\\n]|\\[^\n]+?)'" if language == "rust" else r"'(?:[^'\\\n]|\\.)*(?:'|(?=\n)|\Z)")
    return re.compile(f"(?P<string>{'|'.join(quoted)})|(?P<comment>{'|'.join(comments)})|(?P<sign>\\n|\\S)", re.DOTALL)


def _width(line: str) -> int:
    """Of the white space that a line begins with; a tab reaches to the next multiple of eight, as in Python."""
    return len(line[: len(line) - len(line.lstrip(" \t"))].expandtabs(8))


_PLACES: dict[Ends, Callable[[str, str, str], int]] = {
    "statement": _end_of_statement,
    "block": _end_of_block,
    "function": _end_of_function,
}
