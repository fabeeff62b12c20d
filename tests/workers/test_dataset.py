"""Datasets of the library `datasets`, as `save_to_disk` leaves them."""

from pathlib import Path

import datasets
import pytest

from engine.errors import BadInput, UnknownName
from workers.benchmarks.catalogue import load_benchmark
from workers.benchmarks.sample import Benchmark
from workers.benchmarks.spec import parse_benchmark


@pytest.fixture
def saved(tmp_path: Path) -> str:
    rows = [{"task": n, "text": f"x{n} = ", "code": str(n), "repo": f"r{n % 2}"} for n in range(6)]
    splits = {"test": rows, "train": rows[:1]}
    whole = datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in splits.items()})
    whole.save_to_disk(tmp_path / "mine")
    return str(tmp_path / "mine")


def load(**fields: object) -> Benchmark:
    return load_benchmark(
        parse_benchmark({"prompt": "text", "reference": "code", **fields}),
        tokenizer_of=lambda: pytest.fail("no tokenizer here"),
        max_new_tokens=10,
    )


def test_a_saved_dataset_is_a_benchmark(saved: str) -> None:
    benchmark = load(dataset=saved, id="task", group="repo")
    assert [(s.name, s.prompt, s.reference, s.source_group) for s in benchmark.samples[:2]] == [
        ("0", "x0 = ", "0", "r0"),
        ("1", "x1 = ", "1", "r1"),
    ]
    assert len(benchmark.samples) == 6
    assert len(load(dataset=saved, split="train").samples) == 1
    assert len(load(dataset=saved, samples=4).samples) == 4
    assert benchmark.content_hash == load(dataset=saved, id="task", group="repo").content_hash


def test_what_cannot_be_read_is_said_in_a_sentence(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownName, match="unknown split 'tets'; did you mean 'test'"):
        load(dataset=saved, split="tets")
    with pytest.raises(BadInput, match="row 1: field 'cod' is missing; did you mean 'code'"):
        load(dataset=saved, reference="cod")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="'nobody/nothing' cannot be had"):
        load(dataset="nobody/nothing")


def test_parquet_files_are_a_benchmark(tmp_path: Path) -> None:
    """One file, or all of a folder in the order of their names; a part of the rows is the part of a whole reading."""
    rows = [{"task": n, "text": f"x{n} = ", "code": str(n)} for n in range(60)]
    folder = tmp_path / "parts"
    folder.mkdir()
    for place in range(3):
        datasets.Dataset.from_list(rows[20 * place : 20 * place + 20]).to_parquet(folder / f"part-{place}.parquet")
    whole = load(dataset=str(folder), id="task")
    assert [sample.name for sample in whole.samples] == [str(n) for n in range(60)]
    one = load(dataset=str(folder / "part-1.parquet"), id="task")
    assert one.samples == whole.samples[20:40]
    assert load(dataset=str(folder), id="task", records=[20, 40]).samples == one.samples
    drawn = load(dataset=str(folder), samples=10, seed=3)
    more = load(dataset=str(folder), samples=20, seed=3)
    assert len(drawn.samples) == 10
    assert {sample.name for sample in drawn.samples} < {sample.name for sample in more.samples}


def test_a_row_that_is_no_sample_is_left_out(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": "a", "code": "b"}, {"text": None, "code": "b"}]).save_to_disk(tmp_path / "d")
    benchmark = load(dataset=str(tmp_path / "d"))
    assert len(benchmark.samples) == 1
    [sentence] = benchmark.left_out
    assert sentence.endswith("row 2: field 'text' is a NoneType, not text; it is left out.")
