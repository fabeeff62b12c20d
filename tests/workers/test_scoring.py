"""The metrics, as DESIGN's table defines them."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import Indel

from engine.errors import UnknownName
from workers.scoring.code_tokenizer import code_tokens
from workers.scoring.metrics import metrics, score_text, score_texts, score_tokens, wanted_metrics

SHARES = ["em", "em_line", "es", "rouge_l", "accepted"]
BY_DEFAULT = [*SHARES, "token_agreement", "exact_agreement"]
MORE = ["em_codexglue", "es_codexglue", "rouge_l_default", "bleu", "chrf", "identifier_f1", "accepted_loose"]
MORE += ["accepted_chars", "first_divergence", "pass@1"]
TOKENS = ["token_agreement", "exact_agreement", "first_divergence"]
TEXT = [name for name in BY_DEFAULT + MORE if name not in [*TOKENS, "pass@1"]]
CODE = st.text(st.sampled_from("ab_1+-*/=<>().,:\"' \n\t#é"), max_size=30)
IDS = st.lists(st.integers(0, 5), max_size=12)


def score(name: str, prediction: str, reference: str) -> float:
    return score_text([name], prediction, reference)[name]


def test_every_metric_has_a_version_and_a_description():
    """A score without its implementation's version could be compared with anything."""
    assert list(metrics) == BY_DEFAULT + MORE
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
        ("rouge_l_default", "a-b", "a+b", 1),
        ("rouge_l_default", "", "", 0),
        ("em_codexglue", " a  = <NUM_LIT>\n", "a = 0", 1),
        ("em_codexglue", "a = <STR_LIT:utf-8>", "a = utf-8", 1),
        ("em_codexglue", "x", "x ", 1),  # white space at the reference's end is no token
        ("es_codexglue", "", "", 100),
        ("es_codexglue", "", "a", 0),
        ("es_codexglue", "abcd ", "abxd", 75),
        ("es_codexglue", "abcd", "abxd ", 67),  # the reference is not stripped: 6 of 9
        ("es_codexglue", "abbbbbbb", "acdefghi", 12),  # 12.5, rounded to even
        ("bleu", "return x", "return x", 100),
        ("bleu", "", "x", 0),
        ("chrf", "return x", "return x", 100),
        ("identifier_f1", "x = foo(bar)", "x = foo(baz)", 2 / 3),
        ("identifier_f1", "return not None", "if x:", 0),
        ("identifier_f1", "if True:", "return 1", 1),  # no identifier on either side
        ("identifier_f1", "f('left right')", 'f("other")', 1),
        ("identifier_f1", "f(r'left', b\"right\", u8'x')", "f('y')", 1),  # the letters in front are the literal's
        ("identifier_f1", "print'a', r 'b'", "print, r", 1),
        ("identifier_f1", "a, a", "a", 2 / 3),
        ("accepted_loose", "return valve", "return value", 1),
        ("accepted_loose", "return x", "return y", 0),
        ("accepted_chars", "return y", "return x\nz", 7),
        ("accepted_chars", "a\nb", "a\nb", 1),
    ],
)
def test_hand_computed(name, prediction, reference, expected):
    assert score(name, prediction, reference) == pytest.approx(expected)


@given(CODE, CODE)
def test_text_metrics_agree_with_their_definitions(prediction, reference):
    """0..1, 1 for a text held against itself, `es` the plain ratio, `accepted` the first line's match."""
    scores = score_text(SHARES, prediction, reference)
    assert list(scores) == SHARES
    assert set(score_text(SHARES, reference, reference).values()) == {1}
    assert scores["es"] == pytest.approx(Indel.normalized_similarity(prediction, reference))
    assert scores["accepted"] == scores["em_line"]
    assert scores["em_line"] == 1 or scores["em"] == 0 or prediction.strip() == ""


@given(CODE, CODE)
def test_values_stay_in_their_range(prediction, reference):
    """0..highest, where rounding may add a little; what is counted is a whole number."""
    for name, value in score_text(TEXT, prediction, reference).items():
        assert 0 <= value <= metrics[name].highest + 1e-9
    assert score("accepted_chars", prediction, reference).is_integer()


@given(st.lists(st.tuples(CODE, CODE), max_size=8))
def test_many_at_once_score_as_one_by_one(pairs):
    """The same float, bit by bit: what is scored again must not differ from what was scored first."""
    predictions, references = [one for one, _ in pairs], [other for _, other in pairs]
    many = score_texts(metrics, predictions, references)
    assert list(many) == TEXT
    for place, (prediction, reference) in enumerate(pairs):
        assert score_text(TEXT, prediction, reference) == {name: values[place] for name, values in many.items()}


def test_which_metrics_are_wanted():
    """None: those by default; `all`: every one; a name twice counts once."""
    assert wanted_metrics(None) == BY_DEFAULT
    assert wanted_metrics(["all"]) == [name for name in metrics if name != "pass@1"]
    assert wanted_metrics(["bleu", "es", "bleu"]) == ["bleu", "es"]


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
    ("tokens", "full", "agreement", "exact", "divergence"),
    [
        ([1, 2, 3], [1, 2, 3], 1, 1, 3),
        ([1, 2, 9, 4], [1, 2, 3, 4], 0.75, 0, 2),
        ([1, 2], [1, 2, 3, 4], 1, 0, 2),  # stopped: what it wrote is right, the whole is not
        ([1, 2, 3, 4], [1, 2], 0.5, 0, 2),
        ([], [1], 1, 0, 0),
        ([], [], 1, 1, 0),
    ],
)
def test_token_metrics(tokens, full, agreement, exact, divergence):
    assert list(score_tokens(TOKENS, tokens, full).values()) == [agreement, exact, divergence]


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
