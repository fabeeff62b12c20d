"""The catalogue: small files that tell a benchmark, which people copy and change."""

import json
import re
from pathlib import Path

import pytest

from engine.errors import BadInput
from workers.benchmarks.catalogue import benchmarks, load_benchmark
from workers.benchmarks.declared import ENTRIES, FOLDER_VARIABLE, known_declarations
from workers.benchmarks.ends import cut
from workers.benchmarks.sample import Benchmark
from workers.benchmarks.spec import parse_benchmark

DATA = Path(__file__).parents[3] / "shared" / "data"
FILES = pytest.mark.skipif(not DATA.is_dir(), reason="the published benchmark files are not at ../shared/data")
CONTENT = {
    "codexglue-line": (3819, "d9d5f9"),
    "humaneval-body": (164, "f9217e"),
    "humaneval-infilling-single-line": (1033, "926a6d"),
    "humaneval-lines": (1030, "90814c"),
    "humaneval-x-java-body": (164, "8c2f3e"),
    "humaneval-x-java-lines": (1294, "0cfc42"),
    "mbpp-body": (974, "1b00e4"),
}


@pytest.fixture(autouse=True)
def folder(monkeypatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(DATA))


def load(value: object) -> Benchmark:
    spec = parse_benchmark(value)
    return load_benchmark(spec, tokenizer_of=lambda: pytest.fail("no tokenizer here"), max_new_tokens=10)


@FILES
@pytest.mark.parametrize("name", CONTENT)
def test_content_is_pinned(name):
    """The same samples on every machine: a change comes with a new version."""
    benchmark = load(name)
    assert (len(benchmark.samples), benchmark.content_hash[:6]) == CONTENT[name]
    assert known_declarations()[name].content_hash == benchmark.content_hash


@FILES
@pytest.mark.parametrize("name", CONTENT)
def test_references_are_what_their_own_end_leaves(name):
    """A completion that writes on as the published solution does is scored as an exact match."""
    benchmark = load(name)
    for sample in benchmark.samples:
        assert sample.prompt
        assert sample.reference.strip()
        assert cut(sample.prompt, f"{sample.reference}\nx = 1\n", benchmark.ends, sample.language) == sample.reference


def test_every_entry_says_where_it_comes_from():
    """Licence, citation, what a model may have seen, and where to get the data."""
    for path in ENTRIES.glob("*.yaml"):
        declaration = known_declarations()[path.stem]
        assert declaration.licence
        assert declaration.citation
        assert declaration.contamination
        assert declaration.get.endswith(".")
        assert benchmarks[path.stem].description == declaration.description


def test_absent_data_says_where_to_get_it(monkeypatch, tmp_path):
    """The place that was looked at, and where the file is to be had."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(BadInput) as fault:
        load("mbpp-body")
    assert "there is no file 'mbpp/mbpp.jsonl' in" in str(fault.value)
    assert "fetch mbpp/mbpp.jsonl of github.com/google-research/google-research" in str(fault.value)
    assert "\n" not in str(fault.value)


def declared(tmp_path: Path, **changes: object) -> str:
    """A copy of an entry beside its data, which are others."""
    rows = [
        {
            "task_id": 1,
            "text": "Twice.",
            "code": "import math\r\ndef f(a):\r\n    return 2 * a\r\nX = 1",
            "test": "f(1)",
        },
        {"task_id": 2, "text": "No body.", "code": "f = lambda a: a", "test": "f(1)"},
        {
            "task_id": 3,
            "text": "",
            "code": "def g(a):\n    # nothing\n    return a\ndef f(a):\n    return g(a)",
            "test": "g(1)",
        },
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = re.sub("content_hash: .*\n", "", (ENTRIES / "mbpp-body.yaml").read_text(encoding="utf-8"))
    for old, new in {"mbpp/mbpp.jsonl": "mine.jsonl", "{test_setup_code}\\n{test_list}": "{test}", **changes}.items():
        assert old in text
        text = text.replace(old, str(new))
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_copy_that_was_changed_is_a_benchmark(tmp_path):
    """By its path; what makes no sample is left out with its line, the rest counts."""
    benchmark = load(declared(tmp_path, **{"name: mbpp-body": "name: mine"}))
    first, third = benchmark.samples
    assert (benchmark.name, benchmark.ends, first.name) == ("mine", "function", "1")
    assert first.prompt == "# Twice.\nimport math\ndef f(a):\n"
    assert first.reference == "    return 2 * a"
    assert first.test == "\nX = 1\nf(1)\n"
    assert third.prompt == "# \ndef g(a):\n"
    assert third.test == "\ndef f(a):\n    return g(a)\ng(1)\n"
    [left] = benchmark.left_out
    assert left.endswith("mine.jsonl, line 2: no function with its body on lines of its own; it is left out.")


def test_other_samples_under_a_known_name_are_refused(tmp_path):
    """A data file of another release would make scores that nobody else's can be held against."""
    path = Path(declared(tmp_path))
    text, right = path.read_text(encoding="utf-8"), load(str(path)).content_hash

    def with_hash(content_hash: str) -> str:
        path.write_text(text.replace('version: "1"\n', f'version: "1"\ncontent_hash: "{content_hash}"\n'))
        return str(path)

    assert load(with_hash(right)).content_hash == right
    with pytest.raises(BadInput) as fault:
        load(with_hash("0" * 64))
    assert f"its 2 samples are not those of version '1' (content hash {right[:12]}, not 000000000000)" in str(
        fault.value
    )
    assert str(fault.value).endswith("give it another name and leave content_hash out.")
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("ends: function", "ends: paragraph", "field 'ends' is 'paragraph'"),
        ("licence: CC-BY-4.0\n", "", "field 'licence' is missing"),
        ("{text}", "{txet}", "line 1: field 'txet' is missing; did you mean 'text'?"),
        ("{text}", "{text", "is no text with {field} in it"),
        ("language: python", "language: [", "is not YAML"),
        ("{file: mbpp/mbpp.jsonl}", "{split: test}", "source: give a file, a package with a file, or a dataset."),
    ],
)
def test_a_broken_copy_is_named(tmp_path, old, new, sentence):
    with pytest.raises(BadInput) as fault:
        load(_broken(tmp_path, old, new))
    assert sentence in str(fault.value)
    assert "\n" not in str(fault.value)


def _broken(tmp_path: Path, old: str, new: str) -> str:
    path = Path(declared(tmp_path))
    old = old.replace("mbpp/mbpp.jsonl", "mine.jsonl")
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    return str(path)
