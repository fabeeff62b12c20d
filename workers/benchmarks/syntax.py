"""Code as its grammar has it, by tree-sitter: where functions stand, and where in a line one may stop to think.

Places are counted in characters of the text, as everywhere else; tree-sitter counts bytes.
"""

import importlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice, takewhile
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from engine.errors import BadInput

if TYPE_CHECKING:
    from tree_sitter import Language, Node, Tree


@dataclass(frozen=True)
class Grammar:
    """Where to find a language's grammar, and the names that it gives to what matters here."""

    module: str
    functions: tuple[str, ...]  #: that have a field `body`
    bodies: tuple[str, ...]  #: of functions; others are expressions
    entry: str = "language"


_SCRIPT_FUNCTIONS = (
    "function_declaration",
    "generator_function_declaration",
    "function_expression",
    "method_definition",
    "arrow_function",
)
GRAMMARS = {
    "c": Grammar("tree_sitter_c", ("function_definition",), ("compound_statement",)),
    "cpp": Grammar("tree_sitter_cpp", ("function_definition",), ("compound_statement",)),
    "csharp": Grammar(
        "tree_sitter_c_sharp", ("method_declaration", "constructor_declaration", "local_function_statement"), ("block",)
    ),
    "go": Grammar("tree_sitter_go", ("function_declaration", "method_declaration", "func_literal"), ("block",)),
    "java": Grammar(
        "tree_sitter_java", ("method_declaration", "constructor_declaration"), ("block", "constructor_body")
    ),
    "javascript": Grammar("tree_sitter_javascript", _SCRIPT_FUNCTIONS, ("statement_block",)),
    "php": Grammar(
        "tree_sitter_php", ("function_definition", "method_declaration"), ("compound_statement",), "language_php"
    ),
    "python": Grammar("tree_sitter_python", ("function_definition",), ("block",)),
    "rust": Grammar("tree_sitter_rust", ("function_item",), ("block",)),
    # the grammar of .tsx reads all of TypeScript but casts in angle brackets
    "typescript": Grammar("tree_sitter_typescript", _SCRIPT_FUNCTIONS, ("statement_block",), "language_tsx"),
}

#: nothing is cut within these, whatever the language calls its strings and comments exactly
_WHOLE = ("string", "comment", "char_literal", "character_literal", "rune_literal", "regex", "heredoc", "nowdoc")


@dataclass(frozen=True)
class Body:
    """The body of a function that has lines of its own."""

    start: int  #: behind the line that its head ends with, and behind its docstring in Python
    end: int  #: behind its last character; the closing brace included
    first_line: int  #: of the text, counted from 0
    last_line: int


class _Piece(NamedTuple):
    start: int  #: in bytes
    end: int
    is_comment: bool


def check_grammar(language: str, task: str) -> None:
    """Raises `BadInput` for a language whose syntax is not known here."""
    if language not in GRAMMARS:
        raise BadInput(
            f"task {task!r} follows the syntax, and that of {language} is not known; "
            f"take next-line or random-cut, or one of {', '.join(GRAMMARS)}."
        )


class Code:
    """A text and its tree."""

    def __init__(self, text: str, language: str) -> None:
        self._language = language
        self._kinds = GRAMMARS[language].bodies
        self._bytes = text.encode()
        self._tree = _parsed(self._bytes, language)

    def bodies(self) -> list[Body]:
        """Of all functions that have their body on lines of its own and no fault in it, in the order of their ends."""
        from tree_sitter import QueryCursor

        found = QueryCursor(_query(self._language)).captures(self._tree.root_node).get("body", [])
        bodies = (self._body(node) for node in found if node.type in self._kinds and not node.has_error)
        return sorted({body.start: body for body in bodies if body is not None}.values(), key=lambda body: body.end)

    def places(self, start: int, end: int) -> list[int]:
        """Where between two places of one line a piece of code ends and another follows: identifiers, signs, literals.

        None where the line begins within a string or a comment.
        """
        first, last = self._byte(start), self._byte(end)
        at = bisect_right(self._piece_ends, first)
        if at < len(self._pieces) and self._pieces[at].start < first:
            return []
        pieces = takewhile(lambda piece: piece.start < last, islice(self._pieces, at, None))
        ends = [piece.end for piece in pieces if not piece.is_comment]
        return [self._character(place) for place in ends[:-1] if place < last]

    def begins_in_string(self, start: int) -> bool:
        """Whether a place, such as a line's first, lies within a string or a comment."""
        place = self._byte(start)
        at = bisect_right(self._piece_ends, place)
        return at < len(self._pieces) and self._pieces[at].start < place

    @cached_property
    def _pieces(self) -> list["_Piece"]:
        """All of the text's code in order: strings and comments in one piece, everything else as small as it gets."""
        found = []
        cursor = self._tree.walk()
        while True:
            node = cursor.node
            assert node is not None
            is_whole = _is_whole(node.type)
            if (is_whole or not node.child_count) and node.end_byte > node.start_byte:
                found.append(_Piece(node.start_byte, node.end_byte, "comment" in node.type))
            if not is_whole and cursor.goto_first_child():
                continue
            while not cursor.goto_next_sibling():
                if not cursor.goto_parent():
                    return found

    @cached_property
    def _piece_ends(self) -> list[int]:
        return [piece.end for piece in self._pieces]

    def _body(self, node: "Node") -> Body | None:
        head = node.parent
        assert head is not None
        start, statements = node.start_byte, list(node.named_children)
        if self._language == "python":
            if statements and _is_docstring(statements[0]):
                start = statements.pop(0).end_byte
            else:
                start = self._bytes.rfind(b":", head.start_byte, start) + 1
        else:
            start += 1
        line_end = self._bytes.find(b"\n", start, node.end_byte)
        if not statements or line_end < 0 or not _is_passed_over(self._bytes[start:line_end]):
            return None
        row = self._bytes.count(b"\n", 0, line_end + 1)
        return Body(self._character(line_end + 1), self._character(node.end_byte), row, node.end_point[0])

    @cached_property
    def _starts(self) -> np.ndarray | None:
        """Of each character the byte that it begins at; None where each is one byte."""
        if self._bytes.isascii():
            return None
        is_start = (np.frombuffer(self._bytes, np.uint8) & 0xC0) != 0x80
        return np.append(np.flatnonzero(is_start), len(self._bytes))

    def _byte(self, character: int) -> int:
        return character if self._starts is None else int(self._starts[character])

    def _character(self, byte: int) -> int:
        return byte if self._starts is None else int(np.searchsorted(self._starts, byte))


def _is_passed_over(rest: bytes) -> bool:
    """Of the line that a function's head ends with: no code stands there any more."""
    rest = rest.strip()
    return not rest or rest.startswith((b"#", b"//"))


def _is_docstring(node: "Node") -> bool:
    inner = node.named_children[0] if node.type == "expression_statement" and node.named_child_count == 1 else node
    return inner.type == "string"


@cache
def _is_whole(kind: str) -> bool:
    return any(word in kind for word in _WHOLE)


def _parsed(code: bytes, language: str) -> "Tree":
    from tree_sitter import Parser

    return Parser(_language(language)).parse(code)


@cache
def _language(name: str) -> "Language":
    from tree_sitter import Language

    grammar = GRAMMARS[name]
    return Language(getattr(importlib.import_module(grammar.module), grammar.entry)())


@cache
def _query(name: str):  # type: ignore[no-untyped-def]
    from tree_sitter import Query

    grammar = GRAMMARS[name]
    return Query(_language(name), "\n".join(f"({one} body: (_) @body)" for one in grammar.functions))
