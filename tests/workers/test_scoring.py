"""The metrics, as DESIGN's table defines them."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import Indel

from engine.errors import UnknownName
from workers.scoring.code_tokenizer import code_tokens
from workers.scoring.metrics import metrics, score_text, score_tokens

TEXT = ["em", "em_line", "es", "rouge_l", "accepted"]
TOKENS = ["token_agreement", "exact_agreement"]
CODE = st.text(st.sampled_from("ab_1+-*/=<>().,:\"' \n\t#é"), max_size=30)
IDS = st.lists(st.integers(0, 5), max_size=12)


def score(name: str, prediction: str, reference: str) -> float:
    return score_text([name], prediction, reference)[name]


def test_every_metric_has_a_version_and_a_description():
    """A score without its implementation's version could be compared with anything."""
    assert list(metrics) == TEXT + TOKENS
    assert metrics["es"].version == "es@rapidfuzz-3"
    for name, metric in metrics.items():
        assert metric.name == name
        assert metric.version.startswith(f"{name}@")
        assert metric.description
        assert pickle.loads(pickle.dumps(metric)) == metric


@pytest.mark.parametrize(
    ("name", "prediction", "reference", "expected"),
    [
        ("em", "return x  \n", "return x", 1),
        ("em", " return x", "return x", 0),
        ("em", "return x\ny", "return x\nz", 0),
        ("em_line", "return x\ny", "return x \nz", 1),
        ("em_line", "\nreturn x", "return x", 0),
        ("accepted", "return x\nrest", "return x", 1),
        ("accepted", "return y", "return x", 0),
        ("es", "abcd", "abxd", 0.75),  # longest common subsequence 3: 2 * 3 / 8
        ("es", "", "", 1),
        ("es", "", "a", 0),
        ("rouge_l", "a + b", "a+b", 1),
        ("rouge_l", "a-b", "a+b", 2 / 3),  # rouge_score's own tokenizer would see no difference
        ("rouge_l", "x = f(a)", "x = f(a, b)", 12 / 14),  # 6 of 6 and 6 of 8 tokens
        ("rouge_l", "Foo", "foo", 0),
        ("rouge_l", "\n", "", 1),
        ("rouge_l", "", "x", 0),
    ],
)
def test_hand_computed(name, prediction, reference, expected):
    assert score(name, prediction, reference) == pytest.approx(expected)


@given(CODE, CODE)
def test_text_metrics_agree_with_their_definitions(prediction, reference):
    """0..1, 1 for a text held against itself, `es` the plain ratio, `accepted` the first line's match."""
    scores = score_text(TEXT, prediction, reference)
    assert list(scores) == TEXT
    assert all(0 <= value <= 1 for value in scores.values())
    assert set(score_text(TEXT, reference, reference).values()) == {1}
    assert scores["es"] == pytest.approx(Indel.normalized_similarity(prediction, reference))
    assert scores["accepted"] == scores["em_line"]
    assert scores["em_line"] == 1 or scores["em"] == 0 or prediction.strip() == ""


@given(CODE, CODE)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(prediction, reference):
    """Held against a second implementation over the same tokens."""
    ours, theirs = code_tokens(prediction), code_tokens(reference)
    table = [[0] * (len(theirs) + 1) for _ in range(len(ours) + 1)]
    for i, a in enumerate(ours):
        for j, b in enumerate(theirs):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    total = len(ours) + len(theirs)
    assert score("rouge_l", prediction, reference) == pytest.approx(2 * table[-1][-1] / total if total else 1)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a+=b1", "a += b1"),
        ("x<=y!=z", "x <= y != z"),
        ("f(0xFFu, 1_000, 3.14, .5, 1e-5, 10L)", "f ( 0xFFu , 1_000 , 3.14 , .5 , 1e-5 , 10L )"),
        ("a[0].b->c", "a [ 0 ] . b -> c"),
        ("1..2", "1 .. 2"),
        ("x**2//3", "x ** 2 // 3"),
        ("größe=naïve", "größe = naïve"),
        ('s="a b"', 's = " a b "'),
        ("a?.b??c", "a ?. b ?? c"),
        ("# €", "# €"),
    ],
)
def test_code_tokens(text, tokens):
    """Identifiers, numbers and operators are one token each."""
    assert code_tokens(text) == tokens.split()


@given(CODE)
def test_code_tokens_lose_nothing_but_white_space(text):
    assert "".join(code_tokens(text)) == "".join(text.split())


@pytest.mark.parametrize(
    ("tokens", "full", "agreement", "exact"),
    [
        ([1, 2, 3], [1, 2, 3], 1, 1),
        ([1, 2, 9, 4], [1, 2, 3, 4], 0.75, 0),
        ([1, 2], [1, 2, 3, 4], 1, 0),  # stopped: what it wrote is right, the whole is not
        ([1, 2, 3, 4], [1, 2], 0.5, 0),
        ([], [1], 1, 0),
        ([], [], 1, 1),
    ],
)
def test_token_metrics(tokens, full, agreement, exact):
    assert score_tokens(TOKENS, tokens, full) == {"token_agreement": agreement, "exact_agreement": exact}


@given(IDS, IDS)
def test_exact_agreement_implies_token_agreement(tokens, full):
    scores = score_tokens(TOKENS, tokens, full)
    assert scores["exact_agreement"] == (tokens == full)
    assert 0 <= scores["token_agreement"] <= 1
    assert scores["token_agreement"] == 1 or not scores["exact_agreement"]


def test_each_door_takes_its_own_metrics_and_knows_their_names():
    """The worker passes all of the job's metrics to both."""
    assert list(score_text(metrics, "a", "b")) == TEXT
    assert list(score_tokens(metrics, [1], [1])) == TOKENS
    with pytest.raises(UnknownName, match=r"unknown metric 'rouge'; did you mean 'rouge_l'\?"):
        score_text(["em", "rouge"], "a", "b")
    with pytest.raises(UnknownName, match="unknown metric 'agreement'"):
        score_tokens(["agreement"], [1], [1])
