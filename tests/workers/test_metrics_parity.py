"""Our metrics against the tools whose numbers people compare with, on predictions over real files."""

import gzip
import json
import re
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from workers.scoring.code_tokenizer import code_tokens
from workers.scoring.metrics import score_texts

PY150 = Path(__file__).parents[3] / "shared" / "data" / "codexglue_py150" / "dev.json.gz"
#: what parity is shown on where the published file is absent
HAND = [
    ("return x", "return x"),
    ("", ""),
    ("", "x"),
    ("x", ""),
    (" a = <NUM_LIT:3>\n", "a = <NUM_LIT>"),
    ("f('<STR_LIT:utf-8>', \"<STR_LIT>\")", "f('<STR_LIT>' )"),
    ("a+b", "a-b"),
    ("<STR_LIT:<NUM_LIT:3>>", "<CHAR_LIT:x>"),
]


def real_pairs() -> list[tuple[str, str]]:
    """3,819 references of the py150 dev split, each with a prediction that is wrong in a way of its own."""
    with gzip.open(PY150, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [(_prediction(place, records), record["gt"]) for place, record in enumerate(records)]


def _prediction(place: int, records: list[dict[str, str]]) -> str:
    words = records[place]["gt"].split(" ")
    return [
        records[place]["gt"] + " ",
        " ".join(words[:-1]),
        records[place - 1]["gt"],
        "".join(words),
        " ".join(reversed(words)).replace("<STR_LIT>", "<STR_LIT:utf-8>"),
        records[place]["input"][-40:],
        "",
    ][place % 7]


@pytest.fixture(scope="module", params=["by hand", "py150 dev"])
def pairs(request) -> list[tuple[str, str]]:
    if request.param == "by hand":
        return HAND
    if not PY150.is_file():
        pytest.skip("the published py150 dev file is not at ../shared/data")
    return real_pairs()


def ours(name: str, pairs: list[tuple[str, str]]) -> list[float]:
    return list(score_texts([name], [one for one, _ in pairs], [other for _, other in pairs])[name])


def naive_post_process(text: str) -> str:
    """CodeXGLUE's post-processing, told in other words: the markers are walked through, one at a time."""
    plain = {"<NUM_LIT>": "0", "<STR_LIT>": "", "<CHAR_LIT>": ""}
    for marker, value in plain.items():
        text = value.join(text.split(marker))
    values = [(found.group(0), found.group(2)) for found in re.finditer(r"(?s)<(STR|NUM|CHAR)_LIT:(.*?)>", text)]
    for marker, value in values:
        text = value.join(text.split(marker))
    return text


def naive_ratio(one: str, other: str) -> float:
    """Share of the characters that a longest common subsequence keeps, by the textbook's table."""
    row = [0] * (len(other) + 1)
    for a in one:
        last = row
        row = [0]
        for place, b in enumerate(other):
            row.append(last[place] + 1 if a == b else max(row[-1], last[place + 1]))
    return 2 * row[-1] / (len(one) + len(other)) if one or other else 1.0


def test_codexglue_equals_its_published_definition(pairs):
    """All pairs, exact match and edit similarity, against a second, naive implementation."""
    texts = [(naive_post_process(one.strip()), naive_post_process(other)) for one, other in pairs]
    assert ours("em_codexglue", pairs) == [float(one.split() == other.split()) for one, other in texts]
    assert ours("es_codexglue", pairs) == [round(100 * naive_ratio(one, other)) for one, other in texts]


class _CodeTokenizer(Tokenizer):
    def tokenize(self, text):
        return code_tokens(text)


def test_rouge_l_equals_rouge_score(pairs):
    """The package's own tokenizer, and its scorer over code tokens; the same floats."""
    plain, code = RougeScorer(["rougeL"]), RougeScorer(["rougeL"], tokenizer=_CodeTokenizer())
    assert ours("rouge_l_default", pairs) == [plain.score(other, one)["rougeL"].fmeasure for one, other in pairs]
    with_code = [(one, other) for one, other in pairs if one.strip() or other.strip()]
    assert ours("rouge_l", with_code) == [code.score(other, one)["rougeL"].fmeasure for one, other in with_code]


def test_bleu_and_chrf_equal_sacrebleu(pairs):
    """Sacrebleu's own functions for one sentence, which make their metric anew for every call."""
    from sacrebleu import sentence_bleu, sentence_chrf

    some = pairs[:700]
    assert ours("bleu", some) == [sentence_bleu(one, [other], use_effective_order=True).score for one, other in some]
    assert ours("chrf", some) == [sentence_chrf(one, [other]).score for one, other in some]
