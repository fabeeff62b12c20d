"""The corpus: where code comes from, what is taken out of it and told, and that nothing measured was learned."""

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pytest

from engine.errors import BadInput
from engine.languages import extensions_of
from engine.training.corpus import read_corpora
from engine.training.overlap import Benchmarks, Seen, shingles
from engine.training.sources import Document, open_source
from engine.training.spec import TrainSpec

PYTHON = extensions_of(["python"])


def tokenizer(text: str) -> dict[str, list[int]]:
    """A token a character: windows can be read."""
    return {"input_ids": [ord(sign) for sign in text]}


def code(word: str, lines: int = 40) -> str:
    return "\n".join(f"def {word}_{i}(x, {word}):\n    return x.{word}{i} + {i * i}" for i in range(lines))


def written(folder: Path, **files: str) -> str:
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(folder)


def spec_of(corpus: list[str], holdout: list[str], **fields: Any) -> TrainSpec:
    needed = {"model": "any", "exit_points": (1,), "context": 64, "tokens": 20_000, "holdout_tokens": 2_000}
    return TrainSpec.model_validate(needed | {"corpus": corpus, "holdout": holdout} | fields)


def read(source: str) -> list[Document]:
    with open_source(source, PYTHON) as opened:
        return [document for n in range(len(opened.projects)) if (document := opened.read(n)) is not None]


def removed(manifest: list[dict[str, Any]]) -> dict[str, str]:
    return {file: why for entry in manifest for file, why in entry["removed"]}


# --- sources ---------------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_files_of_the_language_as_text(tmp_path: Path) -> None:
    written(tmp_path, a="x = 1\r\n", b="y = 2\n")
    (tmp_path / "c.txt").write_text("no code")
    (tmp_path / "d.py").write_bytes(b"\xff\xfe not UTF-8")
    (tmp_path / "e.py").write_text("data = '" + "1" * 3000 + "'")
    (tmp_path / "LICENSE").write_text("\nMIT License\n\nCopyright")
    for hidden in (".git", "node_modules", "__pycache__"):
        written(tmp_path / hidden, f="z = 3\n")
    assert [(document.name, document.text) for document in read(str(tmp_path))] == [
        ("a.py", "x = 1\n"), ("b.py", "y = 2\n"),
    ]  # fmt: skip
    assert open_source(str(tmp_path), PYTHON).licence == "MIT License"


def test_an_installed_package_and_the_standard_library_tell_version_and_licence() -> None:
    package = open_source("networkx", PYTHON)
    assert package.version
    assert package.licence == "BSD-3-Clause"
    library = open_source("stdlib", PYTHON)
    assert library.licence == "PSF-2.0"
    names = [name.name for name in map(library.read, range(0, len(library.projects), 50)) if name is not None]
    assert names
    assert not any("site-packages" in name for name in names)


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_a_source_archive_is_read_without_being_unpacked(tmp_path: Path, kind: str) -> None:
    files = {
        "thing-1.2/PKG-INFO": "Metadata-Version: 2.1\nName: thing\nVersion: 1.2\nLicense-Expression: MIT\n\n",
        "thing-1.2/thing/a.py": "x = 1\n",
        "thing-1.2/thing/notes.txt": "no code",
    }
    path = tmp_path / f"thing-1.2.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as packed:
            for name, text in files.items():
                packed.writestr(name, text)
    else:
        with tarfile.open(path, "w:gz") as packed_tar:
            for name, text in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(text)
                packed_tar.addfile(member, io.BytesIO(text.encode()))
    source = open_source(str(path), PYTHON)
    assert (source.version, source.licence, list(source.projects)) == ("1.2", "MIT", ["thing"])
    assert read(str(path)) == [Document("thing-1.2/thing/a.py", "thing", "x = 1\n")]
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


ROWS = [
    {"content": "x = 1\n", "repo_name": "alice/one", "path": "a.py", "license": "mit"},
    {"content": "y = 2\n", "repo_name": "bob/two", "path": "b.py", "license": "apache-2.0"},
]


@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.jsonl.gz", "dataset"])
def test_rows_have_the_projects_that_their_columns_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "dataset":
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
        name = f"datasets:{path}"
    else:
        text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
        path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
        name = str(path)
    with open_source(name, PYTHON) as source:
        assert list(source.projects) == ["alice/one", "bob/two"]
        assert source.licence == "apache-2.0, mit"
    assert [(document.project, document.text) for document in read(name)] == [
        ("alice/one", "x = 1\n"), ("bob/two", "y = 2\n"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.jsonl", b'{"text": "x"}\nnonsense\n', "line 2 is not JSON"),
        ("rows.jsonl", b'{"words": "x"}\n', "line 1 has no text"),
        ("thing.tar.gz", b"nonsense", "cannot be read"),
        ("thing.zip", b"nonsense", "cannot be read"),
    ],
)
def test_a_source_that_is_none_is_refused(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=says):
        open_source(str(tmp_path / name), PYTHON)


# --- what is taken out ---------------------------------------------------------------------------------------------


def test_near_duplicates_are_taken_out_and_named(tmp_path: Path) -> None:
    one = code("alpha")
    corpus = written(tmp_path / "one", a=one, b=one.replace("return x.alpha3 ", "return y.alpha3 "), c=code("beta"))
    learned, _ = read_corpora(spec_of([corpus], [written(tmp_path / "kept", k=code("gamma"))]), tokenizer)
    [(file, why)] = removed(learned.manifest).items()
    assert {file, why} <= {"a.py", "b.py", "near-duplicate of one/a.py", "near-duplicate of one/b.py"}
    assert {window.file for window in learned.windows} == {"a.py", "b.py", "c.py"} - {file}


def test_a_copy_of_what_is_held_out_is_not_learned_though_it_was_not_drawn(tmp_path: Path) -> None:
    """pip carries a copy of rich: a package within a package."""
    kept = {f"k{n}": code(f"gamma{n}") for n in range(8)}
    corpus = written(tmp_path / "one", a=code("alpha"), **{f"vendored{n}": kept[f"k{n}"] for n in range(8)})
    spec = spec_of([corpus], [written(tmp_path / "kept", **kept)], holdout_tokens=500)
    learned, held = read_corpora(spec, tokenizer)
    assert len({window.file for window in held.windows}) < 8
    assert {window.file for window in learned.windows} == {"a.py"}
    assert all("which is held out" in why for why in removed(learned.manifest).values())


def test_what_overlaps_a_benchmark_is_not_learned(tmp_path: Path) -> None:
    """Half a solution in a long file is enough; the layout does not matter."""
    solution = code("delta", lines=6)
    half = "\n\n\n".join(solution.replace("    ", "\t").split("\n")[:6])
    corpus = written(tmp_path / "one", a=code("alpha"), b=code("beta") + "\n" + half + "\n" + code("epsilon"))
    spec = spec_of([corpus], [written(tmp_path / "kept", k=code("gamma"))])
    learned, _ = read_corpora(spec, tokenizer, [("bench 1", code("zeta")), ("bench 2", solution)])
    assert removed(learned.manifest) == {"b.py": "overlaps bench 2"}
    assert {window.file for window in learned.windows} == {"a.py"}


def test_idiom_is_no_overlap() -> None:
    main = 'if __name__ == "__main__":\n    import doctest\n    doctest.testmod()\n'
    benchmarks = Benchmarks([("bench", code("delta") + main)])
    assert benchmarks.overlap(shingles(code("alpha") + main)) is None
    seen = Seen()
    seen.add("a", shingles(code("delta") + main))
    assert seen.duplicate_of(shingles(code("alpha") + main)) is None


# --- what is kept apart ----------------------------------------------------------------------------------------------


def test_without_a_holdout_whole_projects_are_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": code(f"p{p}f{f}"), "project": f"p{p}"} for p in range(10) for f in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = spec_of([str(path)], [], holdout_share=0.2, tokens=100_000, holdout_tokens=10_000)
    learned, held = read_corpora(spec, tokenizer)

    def projects(windows: list[Any]) -> set[str]:
        return {rows[int(window.file.split(":")[0])]["project"] for window in windows}

    assert len(projects(held.windows)) == 2
    assert projects(learned.windows) == {f"p{p}" for p in range(10)} - projects(held.windows)


def test_one_project_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="name folders or packages in holdout"):
        read_corpora(spec_of([written(tmp_path / "one", a=code("alpha"))], []), tokenizer)


@pytest.mark.parametrize(("corpus", "holdout"), [("stdlib", "json"), ("json", "stdlib"), ("networkx", "networkx")])
def test_packages_that_hold_one_another_are_refused(corpus: str, holdout: str) -> None:
    with pytest.raises(BadInput, match="keep them apart"):
        read_corpora(spec_of([corpus], [holdout]), tokenizer)


def test_nothing_left_says_what_was_taken_out_and_why(tmp_path: Path) -> None:
    copy, solution = code("gamma"), code("delta")
    corpus = written(tmp_path / "one", a="x = 1", b=copy, c=solution)
    with pytest.raises(BadInput) as refused:
        read_corpora(spec_of([corpus], [written(tmp_path / "kept", k=copy)]), tokenizer, [("bench", solution)])
    assert "nothing is left of one" in str(refused.value)
    assert "1 files are no python of 64 tokens or more, 1 overlap a benchmark, 1 are near-duplicates" in str(
        refused.value
    )


def test_the_same_spec_gives_the_same_corpus(tmp_path: Path) -> None:
    spec = spec_of(
        [written(tmp_path / "one", **{f"a{n}": code(f"alpha{n}") for n in range(9)})],
        [written(tmp_path / "kept", k=code("gamma"))],
        tokens=3000,
    )
    first, again = (read_corpora(spec, tokenizer) for _ in range(2))
    assert first == again
    other, _ = read_corpora(spec.model_copy(update={"seed": 1}), tokenizer)
    assert other.windows != first[0].windows
    assert other.manifest[0]["sha256"] != first[0].manifest[0]["sha256"]
