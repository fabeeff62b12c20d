"""What docs/benchmarks.md says of hostile completions: the list that is tried, and the endings that are allowed."""

import re
from pathlib import Path

from hostile import HOSTILE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "benchmarks.md").read_text()
SECTION = PAGE.split("### Completions that mean harm\n")[1].split("\n## ")[0]


def rows() -> dict[str, list[str]]:
    """By what a completion does, the endings that its row names."""
    cells = [line.strip("|").split("|") for line in SECTION.splitlines() if line.startswith("| ")]
    return {does.strip(): re.findall(r"`(\w+)`", ends) for does, _, ends in cells if "what becomes of it" not in _}


def test_every_hostile_completion_stands_there_with_what_becomes_of_it() -> None:
    """Red where one is added, taken out or renamed, and where it may end otherwise than is said."""
    assert len(HOSTILE) >= 20
    assert {does: set(ends) for does, ends in rows().items()} == {
        does: {ending.value for ending in one.endings} for does, one in HOSTILE.items()
    }
    assert list(rows()) == list(HOSTILE)


def test_the_tests_that_it_names_exist() -> None:
    named = re.findall(r"`(tests/\S+\.py)(?:::(test_\w+))?`", SECTION)
    assert len(named) >= 3
    for file, test in named:
        assert not test or f"\ndef {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
        assert (ROOT / file).is_file()


def test_the_limits_that_it_names_are_those_in_force() -> None:
    from workers.execution.sandbox import _IDLE_SECONDS, Limits

    limits, text = Limits(), " ".join(PAGE.split())
    assert (limits.seconds, limits.memory, limits.processes, limits.file) == (10, 2**30, 32, 16 * 2**20)
    assert f"10 processor seconds, 1 GiB, 32 processes, 16 MiB and {limits.inodes:,} files on disk" in text
    assert f"| {limits.files} at once |" in SECTION
    assert f"| {limits.inodes:,} at most |" in SECTION
    assert _IDLE_SECONDS == 10
    assert "for ten seconds" in SECTION
