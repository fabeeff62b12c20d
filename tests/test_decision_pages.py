"""The faults that docs/decisions/record.md names: each is put in by tests that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "decisions" / "record.md").read_text()


def test_every_fault_names_tests_that_exist() -> None:
    """Red where a test is renamed, and where a row of the table names none."""
    faults = PAGE[: PAGE.index("\n## ")]
    rows = [line for line in faults.splitlines() if line.startswith("| ") and "| put in by |" not in line]
    assert len(rows) >= 15
    for row in rows:
        named = re.findall(r"`(tests/\S+\.py)::(test_\w+)`", row)
        assert named, row
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
