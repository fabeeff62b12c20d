"""The rules of the API by themselves: buckets, cursors, bodies, questions that are shared."""

import asyncio
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.allowed import Allowed
from cluster.api.cursors import cursor, keys_of
from cluster.api.limits import Rate, check_text
from cluster.api.problems import Problem
from cluster.api.together import Together
from cluster.spec import parse_job
from engine.errors import BadInput


@given(st.lists(st.floats(0, 3), max_size=60))
def test_a_bucket_gives_no_more_than_it_holds_and_gets(pauses: list[float]) -> None:
    """Over any time no more than twice the rate at once, and the rate on the long run."""
    now = [0.0]
    rate, taken = Rate(2.0, clock=lambda: now[0]), 0
    for pause in pauses:
        now[0] += pause
        try:
            rate.take("somebody")
            taken += 1
        except Problem:
            continue
    assert taken <= 4 + 2 * now[0] + 1e-6
    now[0] += 100
    rate.take("somebody")
    rate.take("another")


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=3))
def test_a_cursor_is_read_back(keys: list[int]) -> None:
    assert keys_of(cursor(*keys), len(keys)) == tuple(keys)


@given(st.text(max_size=40) | st.binary(max_size=30).map(lambda raw: raw.decode("latin-1")))
def test_what_is_no_cursor_is_one_sentence(word: str) -> None:
    with suppress(BadInput):
        assert all(0 <= key < 2**63 for key in keys_of(word, 2))
    with pytest.raises(BadInput) as caught:
        keys_of(word + "é", 2)
    assert len(str(caught.value).splitlines()) == 1


@given(st.text())
def test_text_is_what_a_database_keeps(value: str) -> None:
    try:
        check_text(value)
    except ValueError:
        assert "\0" in value or any(0xD800 <= ord(one) < 0xE000 for one in value)


# --- what a spec may read ----------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("open", "closed", "uploads"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "lines.jsonl").write_text("{}\n")
    (tmp_path / "open" / "link").symlink_to(tmp_path / "closed")
    (tmp_path / "open" / "file").symlink_to(tmp_path / "closed" / "lines.jsonl")
    (tmp_path / "open" / "circle").symlink_to(tmp_path / "open" / "circle")
    upload = tmp_path / "uploads" / ("a" * 32)
    (upload / "src").mkdir(parents=True)
    (upload / "lines.jsonl").write_text("{}\n")
    (upload / "lines.jsonl.gz").write_text("{}\n")
    return tmp_path


def checked(tree: Path, **fields: object) -> dict[str, object]:
    spec = {"model": "smollm2-135m", "benchmarks": ["humaneval-lines"], "policies": ["full"]} | fields
    rule = Allowed([str(tree / "open"), "requests", "owner/model"], tree / "uploads")
    return rule.checked(parse_job(spec)).dump()


ATTACKS = [
    ("source", "{}/closed"),
    ("source", "{}/open/../closed"),
    ("source", "{}/open/link"),
    ("source", "{}/open/link/sub"),
    ("source", "{}/open/circle"),
    ("source", "{}/openly"),
    ("source", "/"),
    ("source", "/etc"),
    ("source", "~"),
    ("source", "~root"),
    ("source", "."),
    ("source", ".."),
    ("source", "open"),
    ("source", "os"),
    ("source", "shortstop"),
    ("source", "requests.sessions"),
    ("source", "{}/closed\0"),
    ("source", "/" + "a" * 5000),
    ("source", "file:///etc"),
    ("source", "upload:" + "a" * 32 + "/../" + "b" * 32),
    ("source", "upload:" + "a" * 32 + "/../../closed"),
    ("source", "upload:" + "a" * 32 + "/nothing"),
    ("source", "upload:" + "b" * 32 + "/src"),
    ("source", "upload:../closed/sub"),
    ("source", "upload:" + "a" * 32),
    ("jsonl", "{}/closed/lines.jsonl"),
    ("jsonl", "{}/open/file"),
    ("jsonl", "/etc/passwd"),
    ("jsonl", "/proc/self/environ"),
    ("jsonl", "/dev/zero"),
    ("jsonl", "../../etc/passwd"),
    ("jsonl", "~/.bash_history"),
    ("jsonl", "upload:" + "a" * 32 + "/lines.jsonl.gz"),
    ("dataset", "{}/closed"),
    ("dataset", "upload:" + "a" * 32 + "/src"),
    ("dataset", "owner/other"),
    ("model", "{}/closed"),
    ("model", "owner/other"),
    ("model", "upload:" + "a" * 32 + "/src"),
    ("model", "smollm2-135m/../../../etc"),
    ("exits", "{}/closed"),
    ("exits", "../open"),
]


@pytest.mark.parametrize(("field", "value"), ATTACKS)
def test_a_spec_reads_nothing_that_is_not_allowed(
    tree: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: str
) -> None:
    """One sentence that is the same whether there is such a file or not."""
    monkeypatch.chdir(tree)
    value = value.format(tree) if "{}" in value else value
    fields = {field: value} if field in ("model", "exits") else {"benchmarks": [{field: value}]}
    with pytest.raises(BadInput) as caught:
        checked(tree, **fields)
    assert len(str(caught.value).splitlines()) == 1
    assert any(part in str(caught.value) for part in ("not among what this server allows", "upload"))


def test_what_is_allowed_is_read_where_it_really_lies(tree: Path) -> None:
    def benchmark(**asked: str) -> object:
        [found] = checked(tree, benchmarks=[asked])["benchmarks"]  # type: ignore[misc]
        return found

    assert benchmark(source=f"{tree}/open/./sub/../sub") == {"source": f"{tree}/open/sub"}
    assert benchmark(jsonl=f"{tree}/open/lines.jsonl") == {"jsonl": f"{tree}/open/lines.jsonl"}
    assert benchmark(source="requests") == {"source": "requests"}
    upload = f"{tree}/uploads/{'a' * 32}"
    assert benchmark(source=f"upload:{'a' * 32}/src") == {"source": f"{upload}/src"}
    assert benchmark(jsonl=f"upload:{'a' * 32}/lines.jsonl") == {"jsonl": f"{upload}/lines.jsonl"}
    assert checked(tree, model="owner/model")["model"] == "owner/model"
    assert checked(tree, model=f"{tree}/open")["model"] == f"{tree}/open"


# --- one look for all who ask ------------------------------------------------------------------------------------


def test_each_asker_gets_what_was_true_after_it_asked() -> None:
    """And those who wait share one look. Red where who comes late gets the answer that is on its way already."""
    value, looks, gate = [0], [0], threading.Event()

    def look() -> int:
        looks[0] += 1
        seen = value[0]
        gate.wait(5)
        return seen

    async def ask() -> list[int]:
        together = Together()
        early = asyncio.create_task(together.ask("q", look))
        await asyncio.sleep(0.1)
        value[0] = 1
        late = [asyncio.create_task(together.ask("q", look)) for _ in range(5)]
        other = asyncio.create_task(together.ask("another", look))
        await asyncio.sleep(0.1)
        gate.set()
        return [await one for one in (early, *late, other)]

    assert asyncio.run(ask()) == [0, 1, 1, 1, 1, 1, 1]
    assert looks[0] == 3


def test_a_look_that_fails_fails_for_who_asked_and_nobody_else() -> None:
    def fails() -> int:
        time.sleep(0.05)
        raise BadInput("no")

    async def ask() -> None:
        together = Together()
        first = asyncio.create_task(together.ask("q", fails))
        await asyncio.sleep(0.01)
        second = asyncio.create_task(together.ask("q", lambda: 7))
        with pytest.raises(BadInput):
            await first
        assert await second == 7

    asyncio.run(ask())
