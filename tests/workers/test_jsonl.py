"""JSON lines with named fields, and one clear sentence for each fault in them."""

import gzip
import json
import os
from pathlib import Path

import pytest

from engine.errors import BadInput, UnknownName
from workers.benchmarks import line_index
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
        {"q": "b = ", "a": "2", "n": "last", "repo": "x/y"},
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


GOOD = {"prompt": "p", "reference": "r", "id": "first"}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"prompt": "p", "reference": ', "line 2: not JSON (Expecting value at character 29)"),
        ('{"prompt": "p", "referense": "r"}', "line 2: field 'reference' is missing"),
        ('["p", "r"]', "line 2: holds a list, not an object"),
        ('{"prompt": "p", "reference": null}', "line 2: field 'reference' is a NoneType, not text"),
        ('{"prompt": "", "reference": "r"}', "line 2: field 'prompt' is empty, and a model needs something to go on"),
        ('{"prompt": "p\\u0000", "reference": "r"}', "line 2: field 'prompt' holds a null character"),
        (
            '{"prompt": "p", "reference": "\\ud800"}',
            "line 2: field 'reference' holds a null character or a lone surrogate",
        ),
        ('{"prompt": "p", "reference": "r", "id": true}', "line 2: field 'id' is True, but an id is text or a whole"),
        ('{"prompt": "p", "reference": "  \\n x"}', "line 2: field 'reference' is empty up to the end of its line"),
        ('{"prompt": "p", "reference": ""}', "line 2: field 'reference' is empty; it is left out."),
        ('{"prompt": "p", "reference": " \\n\\t"}', "line 2: field 'reference' is empty; it is left out."),
        ('{"n": ' + "9" * 5000 + "}", "line 2: JSON beyond what Python reads"),
        ("[" * 100_000, "line 2: "),
        (json.dumps({"prompt": "p" * 10_000_000, "reference": "r"}), "line 2: has more than 8,388,608 bytes"),
        (json.dumps(GOOD), "line 2: it repeats line 1, id 'first'"),
    ],
)
def test_a_broken_line_is_left_out_and_the_rest_counts(tmp_path, line, sentence):
    """File and line number and what is wrong, in one sentence; the lines around it are samples as ever."""
    last = GOOD | {"id": "last"}
    file = write(tmp_path / "broken.jsonl", GOOD, line, last)
    for options in ({}, {"records": [0, 3]}):
        benchmark = load({"jsonl": file, "id": "id" if '"id"' in line else None, **options})
        names = ["first", "last"] if '"id"' in line else ["1", "3"]
        assert [sample.name for sample in benchmark.samples] == names
        [left_out] = benchmark.left_out
        assert left_out.startswith(f"{file}, {sentence}")
        assert left_out.endswith("; it is left out.")
        assert "\n" not in left_out


def test_a_test_does_without_a_reference(tmp_path):
    """`pass@1` asks for none; what there is of one must still have something up to its end."""
    rows = [{"prompt": "p", "reference": text, "test": "f()"} for text in ("", "r", "\n x")]
    benchmark = load({"jsonl": write(tmp_path / "tested.jsonl", *rows), "test": "test"})
    assert [(sample.name, sample.reference) for sample in benchmark.samples] == [("1", ""), ("2", "r")]
    assert len(benchmark.left_out) == 1


def test_a_line_that_is_not_utf_8_is_left_out(tmp_path):
    """One row of another encoding in a file of many."""
    file = tmp_path / "mixed.jsonl"
    row = json.dumps(GOOD).encode()
    file.write_bytes(row + b'\n{"prompt": "caf\xe9", "reference": "r"}\n' + row.replace(b"first", b"last") + b"\n")
    benchmark = load({"jsonl": str(file), "id": "id"})
    assert [sample.name for sample in benchmark.samples] == ["first", "last"]
    assert benchmark.left_out == [f"{file}, line 2: byte 16 is not UTF-8; it is left out."]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"prompt": "p", "referense": "r"}], "line 1: field 'reference' is missing; did you mean 'referense'?"),
        ([{"prompt": "p", "x": "r"}], "line 1: field 'reference' is missing; the line has prompt, x."),
        ([GOOD, GOOD | {"reference": "other"}], "line 2: id 'first' is already that of line 1, which holds something"),
    ],
)
def test_what_is_not_safe_to_pass_over_is_refused(tmp_path, rows, sentence):
    """A field that no record has, and an id that means two samples: the benchmark would not be what was asked for."""
    file = write(tmp_path / "wrong.jsonl", *rows)
    with pytest.raises(BadInput) as fault:
        load({"jsonl": file, "id": "id" if "id" in rows[0] else None})
    assert f"{file}, {sentence}" in str(fault.value)
    assert "\n" not in str(fault.value)


def test_a_byte_order_mark_and_windows_line_ends_are_no_fault(tmp_path):
    """The same samples as of the file without them, also where the file is read through its index."""
    rows = [{"prompt": f"p{i}", "reference": "r"} for i in range(5)]
    plain = write(tmp_path / "plain.jsonl", *rows)
    windows = tmp_path / "windows.jsonl"
    windows.write_bytes(b"\xef\xbb\xbf" + Path(plain).read_bytes().replace(b"\n", b"\r\n"))
    for options in ({}, {"records": [0, 4]}, {"samples": 3}):
        one, other = load({"jsonl": plain, **options}), load({"jsonl": str(windows), **options})
        assert one.samples == other.samples
        assert other.left_out == []


def test_only_so_many_sentences_are_kept(tmp_path):
    """A large file that is all wrong fills neither the record nor the report."""
    file = write(tmp_path / "many.jsonl", GOOD, *["no JSON"] * 1000)
    left_out = load({"jsonl": file}).left_out
    assert len(left_out) == 201
    assert left_out[-1] == "800 more are left out."


def test_records_are_taken_by_their_places(tmp_path):
    """Blank lines are no records; numbers stay those of the lines; what lies outside is not looked at."""
    lines = [json.dumps({"prompt": f"p{i}", "reference": "r"}) for i in range(10)]
    file = write(tmp_path / "x.jsonl", *lines[:3], "", "  ", *lines[3:9], "no JSON")
    benchmark = load({"jsonl": file, "records": [2, 5]})
    assert [(sample.name, sample.prompt) for sample in benchmark.samples] == [("3", "p2"), ("6", "p3"), ("7", "p4")]
    assert benchmark.left_out == []
    packed = tmp_path / "x.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(file).read_bytes()))
    assert load({"jsonl": str(packed), "records": [2, 5]}).content_hash == benchmark.content_hash
    with pytest.raises(BadInput, match=r"records is \[5, 2\]; give the first, counted from 0, and one past the last"):
        load({"jsonl": file, "records": [5, 2]})
    with pytest.raises(BadInput, match="has no samples"):
        load({"jsonl": file, "records": [50, 60]})


def test_a_draw_through_the_index_is_the_draw_of_all(tmp_path):
    """Records that are read one by one, where they lie, are those that a whole reading would have drawn; what turns
    out to be broken is replaced by the next of the order.
    """
    lines = [json.dumps({"prompt": f"p{i}", "reference": "r"}) for i in range(300)]
    packed = tmp_path / "x.jsonl.gz"
    for broken in ([], [3, 50, 51, 299]):
        rows = ["no JSON" if place in broken else line for place, line in enumerate(lines)]
        file = write(tmp_path / "x.jsonl", *rows)
        packed.write_bytes(gzip.compress(Path(file).read_bytes()))
        for count in (1, 40, 120, 290):
            spec = {"samples": count, "seed": 5}
            here, there = load({"jsonl": file, **spec}), load({"jsonl": str(packed), **spec})
            assert here.samples == there.samples
            assert len(here.samples) == count


def test_the_index_is_that_of_the_file_as_it_is(tmp_path):
    """A file that changed is looked at again."""
    file = write(tmp_path / "x.jsonl", *[{"prompt": f"p{i}", "reference": "r"} for i in range(4)])
    assert [one.prompt for one in load({"jsonl": file, "records": [3, 9]}).samples] == ["p3"]
    write(tmp_path / "x.jsonl", *[{"prompt": f"longer{i}", "reference": "r"} for i in range(5)])
    assert [one.prompt for one in load({"jsonl": file, "records": [3, 9]}).samples] == ["longer3", "longer4"]


def test_a_change_in_the_middle_of_a_file_is_seen(tmp_path):
    """Of the same size and with the same bytes at both ends: all that is read of a file whose index is kept."""
    file = tmp_path / "x.jsonl"
    lines = [json.dumps({"prompt": f"p{i:04}", "reference": "r"}) for i in range(400)]
    file.write_text("\n".join(lines))
    before = file.stat()
    assert [one.prompt for one in load({"jsonl": str(file), "records": [200, 202]}).samples] == ["p0200", "p0201"]
    longer = len(lines[200]) + 1 + len(lines[201]) - len(lines[200])
    one = json.dumps({"prompt": "p0200" + "x" * longer, "reference": "r"})
    file.write_text("\n".join([*lines[:200], one, *lines[202:]]))
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    found = [one.prompt[:5] for one in load({"jsonl": str(file), "records": [199, 203]}).samples]
    assert found == ["p0199", "p0200", "p0202", "p0203"]


@pytest.mark.parametrize("piece", [1, 2, 7, 64])
def test_lines_are_found_wherever_the_pieces_of_a_file_end(tmp_path, monkeypatch, piece):
    """The index made of small pieces is that of the whole: long lines, blank ones, and a last one without its end."""
    text = b"a\n\n  \nbb bb\r\n\r\n" + b"c" * 100 + b"\n \nlast"
    (tmp_path / "x").write_bytes(text)
    monkeypatch.setattr(line_index, "_PIECE", piece)
    with (tmp_path / "x").open("rb") as file:
        index = line_index.LineIndex(line_index._lines(file))
    expected = []
    at = 0
    for number, line in enumerate(text.split(b"\n"), start=1):
        if line.strip():
            expected.append((at, number))
        at += len(line) + 1
    assert [(index.offset(place), index.number(place)) for place in range(len(index))] == expected


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
