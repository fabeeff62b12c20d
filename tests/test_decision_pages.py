"""The faults and attacks that docs/decisions/ names: each is put in by tests that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("page", "least"), [("record", 15), ("fleet", 20), ("service", 15)])
def test_every_fault_names_tests_that_exist(page: str, least: int) -> None:
    """Red where a test is renamed, and where a row of the table names none."""
    faults = (ROOT / "docs" / "decisions" / f"{page}.md").read_text().split("\n## ")[0]
    head, _, *rows = [line for line in faults.splitlines() if line.startswith("|")]
    assert head.endswith(" by |")
    assert len(rows) >= least
    for row in rows:
        named = re.findall(r"`(tests/\S+\.py)::(test_\w+)`", row)
        assert named, row
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
