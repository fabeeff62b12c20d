"""What a completion is worth, text against reference and tokens against full depth.

Every implementation has a version, written with its scores: a score is only ever compared with one of its own version.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version as installed
from typing import TYPE_CHECKING

from rapidfuzz import fuzz

from engine.registry import Registry

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer


@dataclass(frozen=True)
class Metric:
    name: str
    version: str  #: of the implementation, such as "es@rapidfuzz-3"
    description: str


@dataclass(frozen=True)
class TextMetric(Metric):
    """Holds a completion's text against the reference."""

    function: Callable[[str, str], float]  #: (prediction, reference) -> 0..1


@dataclass(frozen=True)
class TokenMetric(Metric):
    """Holds a completion's token ids against those of the `full` run for the same sample; a stop has none."""

    function: Callable[[Sequence[int], Sequence[int]], float]  #: (token ids, full-depth token ids) -> 0..1


def em(prediction: str, reference: str) -> float:
    """Exact match: equal after stripping trailing white space."""
    return float(prediction.rstrip() == reference.rstrip())


def em_line(prediction: str, reference: str) -> float:
    """Exact match of the first lines."""
    return em(_first_line(prediction), _first_line(reference))


def es(prediction: str, reference: str) -> float:
    """Edit similarity: rapidfuzz's normalised insertion-deletion ratio of the texts as they are."""
    return fuzz.ratio(prediction, reference) / 100


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F (Lin 2004) over code tokens; two texts without any are equal, hence 1."""
    scorer = _rouge_scorer()
    if not prediction.strip() and not reference.strip():
        return 1.0
    return float(scorer.score(reference, prediction)["rougeL"].fmeasure)


def accepted(prediction: str, reference: str) -> float:
    """An offline proxy for a user's acceptance: the first line is an exact match."""
    return em_line(prediction, reference)


def token_agreement(token_ids: Sequence[int], full_token_ids: Sequence[int]) -> float:
    """Share of the tokens written that stand at their place at full depth too; 1 where none was written.

    What a stop left unwritten is no disagreement: stops are accounted for apart.
    """
    if not len(token_ids):
        return 1.0
    equal = sum(token == full for token, full in zip(token_ids, full_token_ids, strict=False))
    return equal / len(token_ids)


def exact_agreement(token_ids: Sequence[int], full_token_ids: Sequence[int]) -> float:
    """Whether the completion equals the full-depth one in full."""
    return float(list(token_ids) == list(full_token_ids))


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0]


@cache
def _rouge_scorer() -> "RougeScorer":
    """Imported on first use: rouge_score brings nltk, seconds that a mere list of names should not cost."""
    from rouge_score.rouge_scorer import RougeScorer

    from workers.scoring.code_tokenizer import CodeTokenizer

    return RougeScorer(["rougeL"], tokenizer=CodeTokenizer())


def _release(package: str, parts: int) -> str:
    """`rapidfuzz-3`: what decides about a score in the package that computes it."""
    return f"{package}-{'.'.join(installed(package).split('.')[:parts])}"


_BUILTIN: list[TextMetric | TokenMetric] = [
    TextMetric("em", "em@1", "exact match, trailing white space stripped", em),
    TextMetric("em_line", "em_line@1", "exact match of the first line", em_line),
    TextMetric("es", f"es@{_release('rapidfuzz', 1)}", "edit similarity, 0..1", es),
    TextMetric("rouge_l", f"rouge_l@{_release('rouge_score', 2)}+code-1", "ROUGE-L F over code tokens", rouge_l),
    TextMetric("accepted", "accepted@em_line-1", "offline proxy of acceptance: the first line matches", accepted),
    TokenMetric("token_agreement", "token_agreement@1", "share of tokens equal to full depth", token_agreement),
    TokenMetric("exact_agreement", "exact_agreement@1", "completions equal to full depth in full", exact_agreement),
]

metrics: Registry[TextMetric | TokenMetric] = Registry(
    "metric", "metrics", {metric.name: metric for metric in _BUILTIN}
)


def score_text(names: Iterable[str], prediction: str, reference: str) -> dict[str, float]:
    """The text metrics among the names; those over tokens are passed over. Raises `UnknownName`.

    Where a task ends with the line, `prediction` is the completion up to its newline.
    """
    known = (metrics[name] for name in names)
    return {metric.name: metric.function(prediction, reference) for metric in known if isinstance(metric, TextMetric)}


def score_tokens(names: Iterable[str], token_ids: Sequence[int], full_token_ids: Sequence[int]) -> dict[str, float]:
    """The token metrics among the names; those over text are passed over. Raises `UnknownName`."""
    known = (metrics[name] for name in names)
    return {
        metric.name: metric.function(token_ids, full_token_ids) for metric in known if isinstance(metric, TokenMetric)
    }
