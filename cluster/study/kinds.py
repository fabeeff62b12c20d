"""What kind of code a token is: that of its first character that is no white space, as pygments reads the file."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

from pygments.lexers import get_lexer_by_name
from pygments.token import Comment, Keyword, Literal, Name, Number, Operator, Punctuation, String
from pygments.util import ClassNotFound

#: in the order of reports; the first that a pygments token is in
_KINDS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("comment", (Comment,)),
    ("string", (String,)),
    ("number", (Number, Literal)),
    ("keyword", (Keyword, Operator.Word)),
    ("name", (Name,)),
    ("operator", (Operator,)),
    ("punctuation", (Punctuation,)),
)
WHITE_SPACE, OTHER = "white space", "other"
KINDS = (*(name for name, _ in _KINDS), WHITE_SPACE, OTHER)


def kinds_of(before: str, pieces: Sequence[str], language: str) -> list[str]:
    """Of tokens, whose texts are given, that stand behind a text. `other` in a language that pygments does not know."""
    lexer = _lexer(language)
    if lexer is None:
        return [OTHER if piece.strip() else WHITE_SPACE for piece in pieces]
    found = list(lexer.get_tokens_unprocessed(before + "".join(pieces)))
    starts = [start for start, _, _ in found]
    begins = accumulate(map(len, pieces), initial=len(before))
    return [
        _kind(found[bisect_right(starts, begin + len(piece) - len(piece.lstrip())) - 1][1])
        if piece.strip()
        else WHITE_SPACE
        for begin, piece in zip(begins, pieces, strict=False)
    ]


def text_before(prompt: str, target: str) -> str:
    """The prompt as the target stands behind it: where that begins with white space taken back, without it."""
    own = len(prompt) - len(prompt.rstrip())
    for taken in range(own, 0, -1):
        if target.startswith(prompt[-taken:]):
            return prompt[:-taken]
    return prompt


def _kind(token: Any) -> str:
    return next((name for name, kinds in _KINDS if any(token in kind for kind in kinds)), OTHER)


@cache
def _lexer(language: str) -> Any:
    try:
        return get_lexer_by_name(language)
    except ClassNotFound:
        return None
