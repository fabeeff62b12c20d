"""The same spec gives the same ids and hashes: here, on another machine, under every Python that is supported.

Needs no model and no database, so that it runs under a Python in which only the packages of `workers.benchmarks` are:
`python3.13 -m pytest --noconftest tests/workers/test_same_everywhere.py`.
"""

import hashlib
import json
from pathlib import Path

import pytest

from workers.benchmarks.catalogue import load_benchmark
from workers.benchmarks.draw import draw
from workers.benchmarks.sample import Benchmark
from workers.benchmarks.spec import parse_benchmark

FILES = {
    "a.py": 'import os\n\n\ndef área(x):\n    """Ü."""\n    y = x * x\n    if y > 2:\n        return [y, "é"]\n'
    "    return None\n",
    "pkg/b.py": "\n".join(f"def f{i}(a, b={i}):\n    c = a + b\n    return c - {i}\n\n" for i in range(9)),
    "C.java": "class C {\n    int add(int a) {\n        int b = a + 1;\n        return b;\n    }\n}\n",
    "d.go": "package d\n\nfunc Add(a int) int {\n\treturn a + 1\n}\n",
    "e.ts": "export function e(a: number): number {\n  const b = a * 2;\n  return b;\n}\n",
    "f.rs": "fn f(a: i32) -> i32 {\n    let b = a;\n    b + 1\n}\n",
}

#: what each spec gives: how many samples, the first of them, the first digits of the content's hash
PINNED = {
    "next-line": (9, "C.java:2", "0968153263b1"),
    "line-rest": (9, "C.java:2:16", "7c96c02f284a"),
    "infill": (9, "C.java:3", "a84bb1018c24"),
    "body": (9, "C.java:3", "a390093ed5f2"),
    "block": (9, "C.java:2:18", "adb317bc6c60"),
    "statement": (9, "C.java:2", "aeb3a785cef4"),
    "all": (60, "1", "4a8297f906c9"),
    "drawn": (20, "2", "7a88875c2e1b"),
    "part": (5, "13", "c2f0672d6120"),
    "groups": (10, "1", "01df41521cd3"),
}
SPECS = {
    "next-line": {"samples": 9, "seed": 3},
    "line-rest": {"task": "line-rest", "samples": 9, "seed": 3},
    "infill": {"task": "single-line-infill", "samples": 9, "seed": 3},
    "body": {"task": "function-body", "samples": 9, "seed": 3},
    "block": {"task": "line-rest", "ends": "block", "samples": 9},
    "statement": {"ends": "statement", "samples": 9, "store_text": False},
}
RECORDS = {
    "all": {},
    "drawn": {"samples": 20, "seed": 7},
    "part": {"records": [10, 30], "samples": 5},
    "groups": {"samples": 10, "group": "repo", "id": "n", "ends": "text"},
}


def load(value: object) -> Benchmark:
    return load_benchmark(
        parse_benchmark(value), tokenizer_of=lambda: pytest.fail("no tokenizer here"), max_new_tokens=10
    )


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHORTSTOP_CACHE", str(tmp_path / "cache"))
    for name, text in FILES.items():
        (tmp_path / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "code" / name).write_text(text, encoding="utf-8")
    return tmp_path / "code"


@pytest.mark.parametrize("name", SPECS)
def test_source_gives_the_pinned_samples(source: Path, name: str) -> None:
    benchmark = load({"source": str(source), "language": "all"} | SPECS[name])
    assert (len(benchmark.samples), benchmark.samples[0].name, benchmark.content_hash[:12]) == PINNED[name]


@pytest.mark.parametrize("name", RECORDS)
def test_records_give_the_pinned_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("SHORTSTOP_CACHE", str(tmp_path / "cache"))
    rows = [{"n": i, "repo": f"r{i % 4}", "prompt": f"x{i} = é", "reference": f" + {i}\n"} for i in range(60)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = load({"jsonl": str(tmp_path / "x.jsonl")} | RECORDS[name])
    assert (len(benchmark.samples), benchmark.samples[0].name, benchmark.content_hash[:12]) == PINNED[name]


def test_a_draw_is_a_beginning_of_an_order() -> None:
    """Of any size: a larger draw with the same seed has all of a smaller one, and the order is pinned."""
    groups = [f"g{i}" for i in range(50)]
    taken = {count: set(draw(groups, len, count, 11)) for count in (1, 10, 60, 150)}
    assert taken[1] < taken[10] < taken[60] < taken[150]
    whole = hashlib.sha256(json.dumps([sorted(taken[count]) for count in sorted(taken)]).encode()).hexdigest()
    assert whole[:12] == "cfd85a886025"
