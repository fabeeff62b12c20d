"""Files of source code: what each language calls them, and which of them nobody would complete in."""

from engine.errors import BadInput
from engine.registry import unknown

#: longer lines are data or minified code, not something that anyone completes
LONGEST_LINE = 2_000
#: bytes; a larger file is generated
LARGEST_FILE = 2 * 1024 * 1024

EXTENSIONS: dict[str, frozenset[str]] = {
    "c": frozenset({".c", ".h"}),
    "cpp": frozenset({".cpp", ".cc", ".cxx", ".hpp", ".hh", ".hxx", ".h"}),
    "csharp": frozenset({".cs"}),
    "go": frozenset({".go"}),
    "java": frozenset({".java"}),
    "javascript": frozenset({".js", ".jsx", ".mjs", ".cjs"}),
    "kotlin": frozenset({".kt", ".kts"}),
    "php": frozenset({".php"}),
    "python": frozenset({".py"}),
    "ruby": frozenset({".rb"}),
    "rust": frozenset({".rs"}),
    "typescript": frozenset({".ts", ".tsx"}),
}


def extensions_of(languages: list[str]) -> frozenset[str]:
    """Extensions of all these languages' files. Raises `BadInput` with the nearest known name."""
    for name in languages:
        if name not in EXTENSIONS:
            raise BadInput(unknown("language", name, list(EXTENSIONS)))
    return frozenset[str]().union(*(EXTENSIONS[name] for name in languages))
