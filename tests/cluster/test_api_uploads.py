"""Uploads: what is in an archive becomes a benchmark, and nothing in it reaches beyond its folder."""

import io
import stat
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from dulwich import porcelain
from hypothesis import given, settings
from hypothesis import strategies as st
from served import Site
from small_world import World

from cluster.api.problems import Problem
from cluster.api.uploads import keep
from cluster.upload import packed_source, uploaded
from engine.errors import BadInput
from workers.benchmarks.spec import SourceBenchmark


def archive(*entries: tuple[str, bytes], mode: int = 0, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as written:
        for name, content in entries:
            entry = zipfile.ZipInfo(name)
            entry.external_attr = mode << 16
            written.writestr(entry, content, compression)
    return out.getvalue()


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(content: bytes, folder: Path, most_mb: int = 1) -> str:
    """The one sentence with which an archive is refused; nothing is left of it."""
    outside = everything(folder.parent)
    with pytest.raises(BadInput) as caught:
        keep(io.BytesIO(content), folder, most_mb, 100)
    assert everything(folder.parent) == outside
    assert list(folder.iterdir()) == []
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "uploads").mkdir()
    (tmp_path / "precious").write_text("mine")
    return tmp_path / "uploads"


@pytest.mark.parametrize(
    "name",
    [
        "../precious", "a/../../precious", "/etc/passwd", "//etc/passwd", "..", ".", "", "a/..", "..\\precious",
        "c:\\x", "c:x", "a\\..\\b", "a\nb", "a\x01", "x" * 300, "/".join("a" * 60), "a" * 256 + "/b", "\u202eb",
        "d/" * 300 + "x", "src/.git/config", "src/.GIT",
    ],
)  # fmt: skip
def test_names_lead_nowhere_else(folder: Path, name: str) -> None:
    assert "archive" in refused(archive((name, b"evil")), folder)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK])
def test_links_and_devices_are_not_taken(folder: Path, kind: int) -> None:
    assert "links and devices" in refused(archive(("a", b"../precious"), mode=kind | 0o777), folder)


def test_sizes_are_counted_and_not_believed(folder: Path) -> None:
    """A small archive of a huge file, of many, and one that lies about its sizes."""
    huge = archive(("a", b"\0" * (5 << 20)))
    assert len(huge) < 10_000
    assert "unpacks to more" in refused(huge, folder)
    many = archive(*((f"f{i}", b"\0" * 100_000) for i in range(60)))
    assert "unpacks to more" in refused(many, folder)
    lying = huge.replace((5 << 20).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    assert lying != huge
    refused(lying, folder)
    assert "entries" in refused(archive(*((f"f{i}", b"") for i in range(20_001))), folder)


def test_two_files_of_one_name_are_refused(folder: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = archive(("a/b", b"1"), ("a/b", b"2"))
    assert "twice" in refused(twice, folder)
    assert "twice" in refused(archive(("a/b", b"1"), ("a/./b", b"2")), folder)
    assert "as a file and as a folder" in refused(archive(("a", b"1"), ("a/b", b"2")), folder)


@pytest.mark.parametrize(
    "content", [b"", b"x", b"PK\x05\x06" + b"\0" * 18, b"PK\x03\x04" + b"\xff" * 100, archive(("a/", b""))]
)
def test_what_is_no_archive_is_one_sentence(folder: Path, content: bytes) -> None:
    refused(content, folder)


@settings(max_examples=300)
@given(st.integers(0, 10**6), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6), st.booleans())
def test_a_damaged_archive_is_refused_or_taken_whole(
    tmp_path_factory: pytest.TempPathFactory, cut: int, changes: list[tuple[int, int]], shorten: bool
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    content = bytearray(archive(("src/a.py", b"x = 1\n" * 30), ("src/b.py", b"y = 2\n")))
    for at, value in changes:
        content[at % len(content)] = value
    if shorten:
        content = content[: cut % len(content)]
    done = None
    with suppress(BadInput):
        done = keep(io.BytesIO(bytes(content)), folder, 1, 100)
    places = list(folder.iterdir())
    assert len(places) == (done is not None)
    for place in places:
        assert done is not None
        assert done.files == len(everything(place))
        assert done.bytes == sum(map(len, everything(place).values()))


def test_the_same_content_is_one_upload(folder: Path) -> None:
    one, again = (keep(io.BytesIO(archive(("s/a.py", b"x"), ("s/b.py", b"y"))), folder, 1, 100) for _ in range(2))
    stored = keep(io.BytesIO(archive(("s/b.py", b"y"), ("s/a.py", b"x"), compression=0)), folder, 1, 100)
    assert one == again == stored
    other = keep(io.BytesIO(archive(("s/a.py", b"xs/b.py"), ("s/b.py", b""))), folder, 1, 100)
    assert other.upload != one.upload
    assert len(list(folder.iterdir())) == 2
    assert everything(folder / one.upload.removeprefix("upload:")) == {"s/a.py": b"x", "s/b.py": b"y"}


def test_old_uploads_make_room_and_young_ones_do_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def upload(letter: str) -> str:
        content = archive((letter, letter.encode() * 700_000))
        return keep(io.BytesIO(content), folder, 1, 2).upload.removeprefix("upload:")

    first, second = upload("a"), upload("b")
    with pytest.raises(Problem, match="full"):
        upload("c")
    assert {place.name for place in folder.iterdir()} == {first, second}
    later = time.time() + 7200
    monkeypatch.setattr(time, "time", lambda: later)
    third = upload("c")
    assert {place.name for place in folder.iterdir()} == {second, third}


def test_an_uploaded_folder_is_a_benchmark(site: Site, tmp_path: Path) -> None:
    source = tmp_path / "mine"
    source.mkdir()
    for number in range(3):
        (source / f"part{number}.py").write_text("\n".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(5)))
    (source / "secret.txt").write_text("not source")
    (source / ".env.py").symlink_to("/etc/passwd")
    headers = {"Content-Type": "application/zip"}
    content = packed_source(SourceBenchmark(source=str(source)))
    answer = site.ask("POST", "/v1/uploads", "submit", content=content, headers=headers)
    assert (answer.status_code, answer.json()["files"]) == (201, 3)
    asked = {"source": f"{answer.json()['upload']}/mine", "samples": 4}
    found = site.ask("POST", "/v1/validate", "submit", json=site.body() | {"benchmarks": [asked]})
    assert found.json()["benchmarks"][0]["name"] == "source:mine samples=4"
    asked["source"] += "/../../../record.db"
    assert site.ask("POST", "/v1/jobs", "submit", json=site.body() | {"benchmarks": [asked]}).status_code == 422


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"x", "application/zip", 422),
        (b"x", "application/x-tar", 415),
        (b"x", "", 415),
        (b"\0" * (65 << 20), "application/zip", 413),
    ],
)
def test_uploads_are_bounded(site: Site, content: bytes, kind: str, status: int) -> None:
    answer = site.ask("POST", "/v1/uploads", "submit", content=content, headers={"Content-Type": kind})
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_body_without_a_length_is_bounded_too(site: Site) -> None:
    def pieces(size: int) -> Callable[[], object]:
        return lambda: (b"x" * 65536 for _ in range(size // 65536))

    for path, kind, size in (("/v1/uploads", "application/zip", 65 << 20), ("/v1/jobs", "application/json", 2 << 20)):
        answer = site.ask("POST", path, content=pieces(size)(), headers={"Content-Type": kind})
        assert answer.status_code == 413, answer.text


def test_of_a_repository_what_is_asked_for_is_uploaded(world: World, tmp_path: Path) -> None:
    """What git tracks, or what a revision had, as plain files: the server has no repository to look into."""
    root = tmp_path / "project"
    root.mkdir()
    porcelain.init(str(root))
    (root / "a.py").write_text("x = 1\ny = 2\n")
    porcelain.add(str(root), [str(root / "a.py")])
    porcelain.commit(str(root), message=b"one", author=b"A <a@b>", committer=b"A <a@b>")
    (root / "a.py").write_text("x = 1\ny = 3\n")
    (root / "draft.py").write_text("z = 1\n")
    asked = [{"source": "project"}, {"source": "project", "revision": "HEAD", "task": "line-rest"}]
    sent: list[dict[str, bytes]] = []

    def send(packed: bytes) -> str:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            sent.append({name: archive.read(name) for name in archive.namelist()})
        return f"upload:{len(sent)}"

    spec = uploaded(world.spec(benchmarks=asked, model="smollm2-135m", exits=None, policies=["full"]), tmp_path, send)
    assert sent == [{"project/a.py": b"x = 1\ny = 3\n"}, {"project/a.py": b"x = 1\ny = 2\n"}]
    assert [one.source for one in spec.benchmarks] == ["upload:1/project", "upload:2/project"]
    assert [one.revision for one in spec.benchmarks] == [None, None]
