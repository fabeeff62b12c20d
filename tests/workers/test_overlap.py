"""What of a benchmark stands in a corpus, found by runs of twelve tokens that reach into a reference."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from engine.errors import BadInput
from engine.shingles import LENGTH, shingles, token_ends, tokens_of
from workers.benchmarks.overlap import corpus_texts, overlap, reaching_in
from workers.benchmarks.sample import Sample

BEFORE = "def total(values, start):\n    result = start\n    for value in values:\n"
REFERENCE = "        result += value * weights[value]"


def sample(name: str, prompt: str, reference: str) -> Sample:
    return Sample(name, prompt, reference, "python", name)


SAMPLES = [
    sample("known", BEFORE, REFERENCE),
    sample("unknown", BEFORE, "        other.append(value, start, 77)"),
    sample("short", "x = ", "1"),
]


def test_shingles_follow_tokens_not_layout():
    """The same whatever white space stands between; another as soon as one token differs; in the text's order."""
    text = "for (int i = 0; i < n; i++) { total += values[i]; }"
    assert len(shingles(text)) == len(tokens_of(text)) - LENGTH + 1 == len(token_ends(text)) - LENGTH + 1
    assert np.array_equal(shingles(text), shingles(text.replace(" ", "\n\t  ")))
    other = shingles(text.replace("values", "value"))
    assert not np.isin(shingles(text)[-5:], other).any()
    assert np.array_equal(shingles(text + " done"), np.append(shingles(text), shingles(text + " done")[-1]))
    assert len(shingles("a b c")) == 0


def test_shingles_hardly_ever_collide():
    """Of two hundred thousand runs that differ in a token or in the order of two, no two have one hash."""
    text = " ".join(f"t{i % 997} s{i % 601}" for i in range(100_000))
    tokens = tokens_of(text)
    runs = {tuple(tokens[i : i + LENGTH]) for i in range(len(tokens) - LENGTH + 1)}
    assert len(np.unique(shingles(text))) == len(runs)


def test_only_runs_that_reach_into_the_reference_count():
    """A prompt that is in the corpus word for word flags nothing by itself."""
    runs = reaching_in(SAMPLES[0])
    assert len(runs) == len(tokens_of(REFERENCE))
    assert not np.isin(runs, shingles(BEFORE)).any()
    assert len(reaching_in(SAMPLES[2])) == 0


def test_a_sample_is_flagged_with_what_is_shared_and_where(tmp_path):
    """A file with other layout, a record of JSON lines, packed or not; the prompt alone is no overlap."""
    (tmp_path / "a.py").write_text(BEFORE)
    (tmp_path / "data").mkdir()
    rows = [{"code": "nothing"}, {"meta": {"body": [(BEFORE + REFERENCE).replace("    ", "\t")]}}]
    (tmp_path / "data" / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = overlap(SAMPLES, str(tmp_path))
    assert (found.texts, found.judged) == (3, 2)
    [flagged] = found.flagged
    assert (flagged.position, flagged.name, flagged.found_in) == (0, "known", "data/x.jsonl, line 2")
    assert flagged.shared == flagged.runs == len(tokens_of(REFERENCE))
    packed = tmp_path / "x.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "data" / "x.jsonl").read_bytes()))
    assert [one.name for one in overlap(SAMPLES, str(packed)).flagged] == ["known"]
    (tmp_path / "data" / "x.jsonl").unlink()
    packed.unlink()
    assert overlap(SAMPLES, str(tmp_path)).flagged == []


def test_an_installed_package_is_a_corpus():
    """Its own code is in it, and that of another package is not."""
    text = Path(json.__file__).with_name("decoder.py").read_text()
    lines = [place for place, line in enumerate(text.split("\n")) if len(line) > 40]
    at = sum(len(line) + 1 for line in text.split("\n")[: lines[5]])
    own = [sample("own", text[:at], text[at : at + 60])]
    assert overlap(own, "json").flagged[0].found_in == "decoder.py"
    assert overlap(own, "wsgiref").flagged == []


def test_files_that_are_no_text_and_broken_lines_are_passed_over(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\0\1")
    (tmp_path / "latin.py").write_bytes(b"caf\xe9")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "b.jsonl").write_text('no JSON\n{"a": "text"}\n')
    assert list(corpus_texts(str(tmp_path))) == [("b.jsonl, line 2", "text")]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("no_such_package", "corpus 'no_such_package': there is no such folder and no such installed package"),
        ("./nowhere", "corpus './nowhere': there is no such folder"),
        ("a.txt", "is not a file of JSON lines; give one, a folder or an installed package"),
        ("empty", "has no text to look through"),
    ],
)
def test_a_corpus_that_is_none_is_one_sentence(tmp_path, monkeypatch, name, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput) as caught:
        overlap(SAMPLES, name)
    assert sentence in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
