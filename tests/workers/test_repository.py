"""A git repository as a benchmark: what it tracks, what a revision had, and what of it nobody there wrote."""

from pathlib import Path

import pytest
from dulwich import porcelain
from dulwich.object_store import iter_tree_contents

from engine.errors import BadInput
from workers.benchmarks.catalogue import load_benchmark
from workers.benchmarks.files import read_source, source_bytes
from workers.benchmarks.sample import Benchmark
from workers.benchmarks.spec import parse_benchmark

CODE = "import os\n\n\ndef area(x):\n    return x * x\n"
ME = b"A Writer <writer@example.org>"


def load(value: object) -> Benchmark:
    return load_benchmark(
        parse_benchmark(value), tokenizer_of=lambda: pytest.fail("no tokenizer here"), max_new_tokens=10
    )


def commit(repository: Path, files: dict[str, str]) -> str:
    for name, content in files.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(content)
    porcelain.add(str(repository), [str(repository / name) for name in files])
    return porcelain.commit(str(repository), message=b"more", author=ME, committer=ME).decode()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits; then a file that is changed, one that is new and one that is gone, none of them committed."""
    root = tmp_path / "project"
    root.mkdir()
    porcelain.init(str(root))
    first = commit(root, {"src/a.py": CODE, "src/gone.py": CODE, "top.py": CODE})
    porcelain.tag_create(str(root), b"v1", objectish=first.encode(), annotated=False)
    commit(root, {"src/a.py": CODE + "print(area(2))\n", "src/b.py": CODE})
    (root / "src" / "b.py").write_text(CODE + "print(area(3))\n")
    (root / "src" / "untracked.py").write_text(CODE)
    (root / "src" / "gone.py").unlink()
    return root


def test_only_what_git_tracks_counts_as_it_lies(repository):
    """Build output and drafts beside the code are not its benchmark; changes to tracked files are."""
    files = read_source(parse_benchmark({"source": str(repository)}))
    assert list(files.texts) == ["src/a.py", "src/b.py", "top.py"]
    assert "area(3)" in files.texts["src/b.py"]
    assert files.left_out == ["src/gone.py is left out: it is not there."]
    assert list(read_source(parse_benchmark({"source": str(repository / "src")})).texts) == ["a.py", "b.py"]


def test_a_folder_of_which_nothing_is_tracked_is_read_as_any_other(repository):
    """An environment within a repository holds installed packages, which git ignores and people measure."""
    installed = repository / "env" / "package"
    installed.mkdir(parents=True)
    (installed / "one.py").write_text(CODE)
    assert list(read_source(parse_benchmark({"source": str(installed)})).texts) == ["one.py"]


def test_a_revision_is_read_from_gits_objects(repository):
    """By tag, branch, number, short number or steps back: the same samples whatever is checked out."""
    tagged = load({"source": str(repository / "src"), "revision": "v1"})
    assert {sample.source_group for sample in tagged.samples} == {"a.py", "gone.py"}
    assert not any("print" in sample.reference for sample in tagged.samples)
    head = porcelain.open_repo(str(repository)).head().decode()
    now = load({"source": str(repository / "src"), "revision": "HEAD"})
    assert any("print" in sample.reference for sample in now.samples)
    for name in (head, head[:8], "master"):
        assert load({"source": str(repository / "src"), "revision": name}).content_hash == now.content_hash
    assert load({"source": str(repository / "src"), "revision": "HEAD~1"}).content_hash == tagged.content_hash
    assert "revision=v1" in tagged.name


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"revision": "v9"}, "revision 'v9' is not in the repository"),
        ({"revision": "v1", "source": "json"}, "is not a folder, so it has no revision"),
        ({"task": "random-cut", "ends": "line"}, "ends is 'line', but task random-cut ends with 'text'"),
        ({"language": "pyton"}, "did you mean 'python'?"),
        ({"language": ["python", "all"]}, "unknown language 'all'"),
    ],
)
def test_what_cannot_be_is_one_sentence(repository, spec, sentence):
    with pytest.raises(BadInput) as caught:
        load({"source": str(repository)} | spec)
    assert sentence in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_damaged_repository_is_one_sentence(repository):
    """An index of which half is lost: neither a fault of ours nor a benchmark of half the files."""
    index = repository / ".git" / "index"
    index.write_bytes(index.read_bytes()[:40])
    with pytest.raises(BadInput, match="cannot be read") as caught:
        load({"source": str(repository)})
    assert len(str(caught.value).splitlines()) == 1


def test_a_clone_that_lacks_a_file_leaves_it_out(repository):
    """Partial clones fetch contents when they are asked for; a benchmark asks nobody."""
    git = porcelain.open_repo(str(repository))
    twin = commit(repository, {"alone.py": CODE + "print(4)\n"})
    tree = iter_tree_contents(git.object_store, git[twin.encode()].tree)
    [id] = [entry.sha for entry in tree if b"alone" in entry.path]
    (repository / ".git" / "objects" / id.decode()[:2] / id.decode()[2:]).unlink()
    files = read_source(parse_benchmark({"source": str(repository), "revision": "HEAD"}))
    assert "alone.py is left out: it cannot be read (this clone lacks its content)." in files.left_out
    assert "src/a.py" in files.texts


def test_a_revision_needs_a_repository(tmp_path):
    with pytest.raises(BadInput, match="lies in no git repository; leave the field revision out"):
        load({"source": str(tmp_path), "revision": "HEAD"})


def test_what_nobody_there_wrote_is_left_out_with_its_reason(tmp_path):
    """Copied folders, generated files by name and by what they say; `.gitattributes` overrules both."""
    files = {
        "ours.py": CODE,
        "vendor/lib/a.py": CODE,
        "vendor/lib/b.py": CODE,
        "pkg/third_party/c.py": CODE,
        "api_pb2.py": CODE,
        "made.py": "# Code generated by make. DO NOT EDIT.\n" + CODE,
        "says.py": '"""Tells how "do not edit" marks generated files."""\n' + CODE,
        "kept_pb2.py": CODE,
        "hand/made.py": CODE,
        ".gitattributes": "kept_pb2.py -linguist-generated\nhand/*.py linguist-generated=true\n# no=line\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = read_source(parse_benchmark({"source": str(tmp_path)}))
    assert list(found.texts) == ["kept_pb2.py", "ours.py"]
    reasons = {name: reason for name, _, reason in (one.partition(" is left out: ") for one in found.left_out)}
    assert reasons == {
        "api_pb2.py": "it is generated: its name is that of generated code.",
        "hand/made.py": "it is generated: .gitattributes says so.",
        "made.py": "it is generated: line 1 says that it is generated.",
        "pkg/third_party/": "it holds copies of other people's code, 1 file.",
        "says.py": "it is generated: line 1 says that it is generated.",
        "vendor/": "it holds copies of other people's code, 2 files.",
    }


def test_patterns_choose_files_as_in_gitignore(repository):
    """`include` first, `exclude` against it; neither is a fault that a report would tell of."""
    chosen = read_source(parse_benchmark({"source": str(repository), "include": "src/", "exclude": ["b.*"]}))
    assert list(chosen.texts) == ["src/a.py"]
    assert not any("b.py" in one or "top.py" in one for one in chosen.left_out)


def test_a_client_takes_along_what_the_benchmark_reads(repository):
    """The server, which has no repository, makes the same samples of it."""
    for spec in ({"source": str(repository)}, {"source": str(repository), "revision": "v1"}):
        here = load(spec)
        there = repository.parent / f"server{len(here.samples)}" / "project"
        for name, content in source_bytes(parse_benchmark(spec)):
            (there / name).parent.mkdir(parents=True, exist_ok=True)
            (there / name).write_bytes(content)
        assert load({"source": str(there)}).content_hash == here.content_hash
