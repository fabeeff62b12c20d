"""Names that third parties may add to, through the entry points of installed packages."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from engine.errors import UnknownName

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """What is known under a name: the built-in entries, and those of the entry point group `shortstop.<plural>`.

    Entry points are looked up when a name is not built in, or when all names are listed; never at import.
    """

    def __init__(self, word: str, plural: str, builtin: Mapping[str, T]) -> None:
        self.word = word
        self.group = f"shortstop.{plural}"
        self._builtin = dict(builtin)

    @cached_property
    def _installed(self) -> dict[str, T]:
        found = {point.name: point.load() for point in entry_points(group=self.group)}
        return {name: entry for name, entry in found.items() if name not in self._builtin}

    def __getitem__(self, name: str) -> T:
        if name in self._builtin:
            return self._builtin[name]
        if name in self._installed:
            return self._installed[name]
        raise UnknownName(unknown(self.word, name, list(self)))

    def __contains__(self, name: object) -> bool:
        return name in self._builtin or name in self._installed

    def __iter__(self) -> Iterator[str]:
        yield from self._builtin
        yield from self._installed

    def __len__(self) -> int:
        return len(self._builtin) + len(self._installed)


def unknown(word: str, name: str, known: list[str]) -> str:
    """One sentence about a name that is not known, with the nearest one that is."""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known)) or 'none'}."
    return f"unknown {word} {name!r}; {hint}"
