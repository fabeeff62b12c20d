"""JSON lines with named fields, and one clear sentence for each fault in them."""

import gzip
import json
from pathlib import Path

import pytest

from engine.errors import BadInput, UnknownName
from workers.benchmarks.catalogue import load_benchmark
from workers.benchmarks.sample import Benchmark
from workers.benchmarks.spec import parse_benchmark

DATA = Path(__file__).parents[3] / "shared" / "data"


def load(value: object) -> Benchmark:
    return load_benchmark(
        parse_benchmark(value), tokenizer_of=lambda: pytest.fail("no tokenizer here"), max_new_tokens=10
    )


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def test_fields_are_named_by_the_spec(tmp_path):
    """Each field comes from where the spec says; a number is an id too; a blank line is no sample but is counted."""
    file = write(
        tmp_path / "mine.jsonl",
        {"q": "a = ", "a": "1", "n": 7, "repo": "x/y", "more": [1]},
        "",
        {"q": "b = ", "a": "", "n": "last", "repo": "x/y"},
    )
    spec = {"jsonl": file, "prompt": "q", "reference": "a", "id": "n", "group": "repo", "language": "go"}
    benchmark = load({**spec, "ends": "text"})
    first, last = benchmark.samples
    assert (first.name, first.prompt, first.reference) == ("7", "a = ", "1")
    assert (first.language, first.source_group) == ("go", "x/y")
    assert last.name == "last"
    assert benchmark.ends == "text"
    assert load({**spec, "ends_with_line": False}) == benchmark  # as jobs of before say it
    unnamed = load({"jsonl": file, "prompt": "q", "reference": "a"})
    assert [(sample.name, sample.source_group) for sample in unnamed.samples] == [("1", "1"), ("3", "3")]


def test_version_follows_the_content_unless_named(tmp_path):
    """An unnamed file promises nothing, so its version changes with it; a name is a promise, so only the hash does."""
    folder = tmp_path / "a"
    folder.mkdir()
    one, other = write(folder / "x.jsonl", {"prompt": "p", "reference": "r"}), str(tmp_path / "x.jsonl")
    write(Path(other), {"prompt": "p", "reference": "R"})
    before, after = load({"jsonl": one}), load({"jsonl": other})
    assert before.name == after.name == "jsonl:x.jsonl"
    assert before.version != after.version
    before, after = load({"jsonl": one, "name": "mine"}), load({"jsonl": other, "name": "mine"})
    assert (before.name, before.version) == (after.name, after.version) == ("mine", "2")
    assert before.content_hash != after.content_hash


def test_the_path_is_not_part_of_the_content(tmp_path):
    """The same lines elsewhere, packed or not, are the same benchmark."""
    rows = [{"prompt": f"p{i}", "reference": "r", "id": i} for i in range(20)]
    plain = write(tmp_path / "x.jsonl", *rows)
    packed = tmp_path / "y.json.gz"
    packed.write_bytes(gzip.compress(Path(plain).read_bytes()))
    spec = {"id": "id", "samples": 5, "seed": 3}
    assert load({"jsonl": plain, **spec}).content_hash == load({"jsonl": str(packed), **spec}).content_hash


def test_a_draw_keeps_the_files_order(tmp_path):
    """Groups that take turns in the file still do in what is drawn of it."""
    rows = [{"prompt": str(i), "reference": "r", "group": "ab"[i % 2]} for i in range(20)]
    drawn = load({"jsonl": write(tmp_path / "x.jsonl", *rows), "group": "group", "samples": 10})
    numbers = [int(sample.prompt) for sample in drawn.samples]
    assert numbers == sorted(numbers)
    assert [sample.source_group for sample in drawn.samples].count("a") == 5


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"prompt": "p", "reference": ', "line 2: not JSON (Expecting value at character 29)"),
        ('{"prompt": "p", "referense": "r"}', "line 2: field 'reference' is missing; did you mean 'referense'?"),
        ('{"prompt": "p", "x": "r"}', "line 2: field 'reference' is missing; the line has prompt, x."),
        ('["p", "r"]', "line 2: holds a list, not an object"),
        ('{"prompt": "p", "reference": null}', "line 2: field 'reference' is a NoneType, not text"),
        ('{"prompt": "", "reference": "r"}', "line 2: field 'prompt' is empty"),
        ('{"prompt": "p\\u0000", "reference": "r"}', "line 2: field 'prompt' holds a null character"),
        (
            '{"prompt": "p", "reference": "\\ud800"}',
            "line 2: field 'reference' holds a null character or a lone surrogate",
        ),
        ('{"prompt": "p", "reference": "r", "id": true}', "line 2: field 'id' is True"),
        ('{"prompt": "p", "reference": "r", "id": "first"}', "line 2: id 'first' is already that of line 1"),
        ('{"n": ' + "9" * 5000 + "}", "line 2: JSON beyond what Python reads"),
        ("[" * 100_000, "line 2: "),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, sentence):
    """File and line number, what is wrong and what to do: in one sentence."""
    file = write(tmp_path / "broken.jsonl", {"prompt": "p", "reference": "r", "id": "first"}, line)
    with pytest.raises(BadInput) as fault:
        load({"jsonl": file, "id": "id" if '"id"' in line else None})
    assert f"{file}, {sentence}" in str(fault.value)
    assert "\n" not in str(fault.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    """No such file, a folder, bytes that are no UTF-8, half a gzip file, no sample at all."""
    latin, half, empty = tmp_path / "latin.jsonl", tmp_path / "half.jsonl.gz", tmp_path / "empty.jsonl"
    latin.write_bytes(b'{"prompt": "caf\xe9", "reference": "r"}\n')
    half.write_bytes(gzip.compress(b'{"prompt": "p", "reference": "r"}\n' * 1000)[:-20])
    empty.write_text("\n\n")
    for path, sentence in [
        (tmp_path / "none.jsonl", "cannot be read: No such file"),
        (tmp_path, "cannot be read: Is a directory"),
        (latin, "line 1: byte 16 is not UTF-8"),
        (half, "is not a whole gzip file"),
        (empty, "benchmark 'jsonl:empty.jsonl' has no samples"),
    ]:
        with pytest.raises(BadInput) as fault:
            load({"jsonl": str(path)})
        assert sentence in str(fault.value)


def test_an_unknown_benchmark_gets_the_nearest_name():
    with pytest.raises(UnknownName, match=r"unknown benchmark 'humaneval-line'; did you mean 'humaneval-lines'\?"):
        load("humaneval-line")


@pytest.mark.skipif(not DATA.is_dir(), reason="the published benchmark files are not at ../shared/data")
def test_published_files_are_read_whole():
    """Real files: MBPP with its carriage returns, HumanEval-X Java packed."""
    mbpp = load(
        {"jsonl": str(DATA / "mbpp" / "mbpp.jsonl"), "prompt": "text", "reference": "code", "id": "task_id"}
        | {"ends": "text"}
    )
    assert len(mbpp.samples) == 974
    assert "\r\n" in mbpp.samples[0].reference
    java = DATA / "humaneval_x_java" / "humaneval_java.jsonl.gz"
    whole = load({"jsonl": str(java), "reference": "canonical_solution", "id": "task_id", "language": "java"})
    assert [sample.name for sample in whole.samples] == [f"Java/{i}" for i in range(164)]
