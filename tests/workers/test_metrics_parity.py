"""Our metrics against definitions of somebody else's: the tools whose numbers people compare with, and second, naive
implementations. On the published py150 dev file they make the table of docs/benchmarks.md.
"""

import gzip
import json
import keyword
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from pygments.lexers import PythonLexer
from pygments.token import Keyword, Name, Operator
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu import sentence_bleu, sentence_chrf

from workers.scoring import text
from workers.scoring.code_tokenizer import code_tokens
from workers.scoring.metrics import ExecutedMetric, TextMetric, metrics, score_texts, score_tokens

ROOT = Path(__file__).parents[2]
PY150 = ROOT.parent / "shared" / "data" / "codexglue_py150" / "dev.json.gz"
Pairs = list[tuple[str, str]]
#: what parity is shown on where the published file is absent
HAND: Pairs = [
    ("return x", "return x"),
    ("", ""),
    ("", "x"),
    ("x", ""),
    (" a = <NUM_LIT:3>\n", "a = <NUM_LIT>"),
    ("f('<STR_LIT:utf-8>', \"<STR_LIT>\")", "f('<STR_LIT>' )"),
    ("a+b", "a-b"),
    ("<STR_LIT:<NUM_LIT:3>>", "<CHAR_LIT:x>"),
    ("x = a\ny = b", "x = a \nz"),
]


@cache
def pairs(which: str) -> Pairs:
    """By hand; or 3,819 references of the py150 dev split, each with a prediction that is wrong in a way of its own."""
    if which == "by hand":
        return HAND
    if not PY150.is_file():
        pytest.skip("the published py150 dev file is not at ../shared/data")
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


# --- second definitions ----------------------------------------------------------------------------------------------


def post_processed(code: str) -> str:
    """CodeXGLUE's post-processing, told in other words: the markers are walked through, one at a time."""
    plain = {"<NUM_LIT>": "0", "<STR_LIT>": "", "<CHAR_LIT>": ""}
    for marker, value in plain.items():
        code = value.join(code.split(marker))
    values = [(found.group(0), found.group(2)) for found in re.finditer(r"(?s)<(STR|NUM|CHAR)_LIT:(.*?)>", code)]
    for marker, value in values:
        code = value.join(code.split(marker))
    return code


def ratio(one: str, other: str) -> float:
    """Share of the characters that a longest common subsequence keeps, by the textbook's table."""
    row = [0] * (len(other) + 1)
    for a in one:
        last = row
        row = [0]
        for place, b in enumerate(other):
            row.append(last[place] + 1 if a == b else max(row[-1], last[place + 1]))
    return 2 * row[-1] / (len(one) + len(other)) if one or other else 1.0


def line(code: str) -> str:
    found = re.match(r"[^\n]*", code)
    assert found is not None
    return found[0]


def equal(one: str, other: str) -> float:
    return float(re.sub(r"\s+\Z", "", one) == re.sub(r"\s+\Z", "", other))


class _CodeTokenizer(Tokenizer):
    def tokenize(self, code):
        return code_tokens(code)


LEXER = PythonLexer(stripnl=False, ensurenl=False)
PLAIN, CODE = RougeScorer(["rougeL"]), RougeScorer(["rougeL"], tokenizer=_CodeTokenizer())


def rouge(scorer: RougeScorer, one: str, other: str) -> float:
    return scorer.score(other, one)["rougeL"].fmeasure


def names(code: str) -> Counter[str] | None:
    """As Pygments finds them; None where a string is cut in two, of which everybody makes something else."""
    if code.count("'") % 2 or code.count('"') % 2:
        return None
    words = [
        word
        for kind, value in LEXER.get_tokens(code)
        if kind in Name or kind in Keyword or kind in Operator.Word
        for word in re.findall(r"[^\W\d]\w*", value)
    ]
    reserved = {*keyword.kwlist, *text._RESERVED.split()}
    return Counter(word for word in words if word not in reserved)


def names_f1(one: str, other: str) -> float | None:
    ours, theirs = names(one), names(other)
    if ours is None or theirs is None:
        return None
    if not ours and not theirs:
        return 1.0
    shared = sum(min(count, theirs[name]) for name, count in ours.items())
    precision, recall = (shared / sum(side.values()) if side else 0.0 for side in (ours, theirs))
    return 2 * precision * recall / (precision + recall) if shared else 0.0


def ids(code: str) -> list[int]:
    """Token ids: what stands between spaces, numbered by its characters."""
    return [sum(map(ord, word)) for word in code.split(" ")] if code else []


def places(one: str, other: str) -> np.ndarray:
    """Of the tokens of one, which stand at their place in the other."""
    ours, theirs = np.array(ids(one), np.int64), np.array(ids(other), np.int64)
    padded = np.full(len(ours), -1)
    padded[: len(theirs)] = theirs[: len(ours)]
    return ours == padded


@dataclass(frozen=True)
class Independent:
    """A metric's definition, by somebody else or in other words."""

    said: str  #: in the document
    value: Callable[[str, str], float | None]  #: (prediction, reference); None where it says nothing
    within: float = 0.0  #: of what our value may differ by


INDEPENDENT = {
    "em": Independent("equal but for the white space that a regular expression finds at the end", equal),
    "em_line": Independent("the same of the lines that another one finds", lambda a, b: equal(line(a), line(b))),
    "es": Independent("longest common subsequence by the textbook's table", ratio, 1e-12),
    "rouge_l": Independent(
        "`rouge_score`, given our tokenizer",
        lambda a, b: rouge(CODE, a, b) if a.strip() or b.strip() else 1.0,
    ),
    "accepted": Independent("as `em_line`", lambda a, b: equal(line(a), line(b))),
    "em_codexglue": Independent(
        "the published evaluator's, literals replaced one at a time",
        lambda a, b: float(post_processed(a.strip()).split() == post_processed(b).split()),
    ),
    "es_codexglue": Independent(
        "the same, with the table of `es`",
        lambda a, b: float(round(100 * ratio(post_processed(a.strip()), post_processed(b)))),
    ),
    "rouge_l_default": Independent("`rouge_score` as it comes", lambda a, b: rouge(PLAIN, a, b)),
    "bleu": Independent(
        "sacrebleu's `sentence_bleu`, effective order",
        lambda a, b: sentence_bleu(a, [b], use_effective_order=True).score,
    ),
    "chrf": Independent("sacrebleu's `sentence_chrf`", lambda a, b: sentence_chrf(a, [b]).score),
    "identifier_f1": Independent("names as Pygments finds them, where no string is cut in two", names_f1, 1e-12),
    "accepted_loose": Independent("as `es`, of the first lines", lambda a, b: float(ratio(line(a), line(b)) >= 0.9)),
    "accepted_chars": Independent(
        "the longest of all beginnings of the line that is one of the other",
        lambda a, b: float(max(n for n in range(len(line(a)) + 1) if line(b).startswith(line(a)[:n]))),
    ),
    "token_agreement": Independent(
        "columns of numpy; words in place of tokens",
        lambda a, b: float(places(a, b).mean()) if ids(a) else 1.0,
        1e-12,
    ),
    "exact_agreement": Independent("the same", lambda a, b: float(np.array_equal(ids(a), ids(b)))),
    "first_divergence": Independent("the same", lambda a, b: float(np.append(places(a, b), False).argmin())),
}


@dataclass(frozen=True)
class Agreement:
    """How far a metric and its independent definition are the same."""

    samples: int  #: of which the definition says anything
    equal: int
    within: float


def ours(name: str, which: Pairs) -> list[float]:
    if isinstance(metrics[name], TextMetric):
        return list(score_texts([name], [one for one, _ in which], [other for _, other in which])[name])
    return [score_tokens([name], ids(one), ids(other))[name] for one, other in which]


@cache
def agreement(name: str, which: str) -> Agreement:
    definition, both = INDEPENDENT[name], pairs(which)
    found = list(zip(ours(name, both), (definition.value(one, other) for one, other in both), strict=True))
    known = [(mine, theirs) for mine, theirs in found if theirs is not None]
    same = sum(math.isclose(mine, theirs, rel_tol=0, abs_tol=definition.within) for mine, theirs in known)
    return Agreement(len(known), same, definition.within)


def test_every_metric_has_another_definition():
    """Of those that execute, the tests of the sandbox have HumanEval's own solutions."""
    assert set(INDEPENDENT) == {name for name, one in metrics.items() if not isinstance(one, ExecutedMetric)}


@pytest.mark.parametrize("which", ["by hand", "py150 dev"])
@pytest.mark.parametrize("name", INDEPENDENT)
def test_a_metric_equals_its_other_definition(name: str, which: str):
    """Of every pair; what another tool computes, to the last bit."""
    found = agreement(name, which)
    assert found.equal == found.samples
    assert found.samples >= (len(pairs(which)) if name != "identifier_f1" else 0.95 * len(pairs(which)))


def test_the_predictions_are_wrong_in_many_ways():
    """Parity of what is always right, or always wrong, would say nothing."""
    for name in INDEPENDENT:
        assert len(set(ours(name, pairs("py150 dev")))) > 1
    assert 0.1 < np.mean(ours("em_codexglue", pairs("py150 dev"))) < 0.9


def table() -> list[str]:
    """A row a metric: what defines it a second time, samples, agreement."""
    rows = []
    for name, definition in INDEPENDENT.items():
        found = agreement(name, "py150 dev")
        how = f"within {found.within:g}" if found.within else "to the last bit"
        agreed = f"{found.equal:,} of {found.samples:,}, {how}"
        rows.append(f"| `{name}` | {definition.said} | {found.samples:,} | {agreed} |")
    return rows


def test_the_documents_table_is_what_comes_out():
    """docs/benchmarks.md, Parity."""
    section = (ROOT / "docs" / "benchmarks.md").read_text().split("### Parity\n")[1].split("\n#")[0]
    assert [row for row in section.splitlines() if row.startswith("| `")] == table()
