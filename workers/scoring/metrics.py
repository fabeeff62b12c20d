"""What a completion is worth, text against reference and tokens against full depth.

Every implementation has a version, written with its scores: a score is only ever compared with one of its own version.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed

from engine.registry import Registry
from workers.execution.pass_at_1 import pass_at_1
from workers.scoring import codexglue, text
from workers.scoring.tokens import exact_agreement, first_divergence, token_agreement


@dataclass(frozen=True)
class Metric:
    name: str
    version: str  #: of the implementation, such as "es@rapidfuzz-3"
    description: str


@dataclass(frozen=True)
class TextMetric(Metric):
    """Holds a completion's text against the reference."""

    function: Callable[[str, str], float]  #: (prediction, reference) -> 0..highest
    highest: float = 1.0  #: of its values; infinite where it counts
    #: whether it is computed where a spec names no metrics
    by_default: bool = True
    #: the same over many pairs, where that is faster: (predictions, references) -> a value a pair
    of_many: Callable[[Sequence[str], Sequence[str]], Sequence[float]] | None = None


@dataclass(frozen=True)
class ExecutedMetric(Metric):
    """Runs a completion against its sample's test, in a sandbox: only where it is asked for, and allowed."""

    function: Callable[[str, str, str], float]  #: (prompt, prediction, test) -> 0..1
    highest: float = 1.0
    by_default: bool = False


@dataclass(frozen=True)
class TokenMetric(Metric):
    """Holds a completion's token ids against those of the `full` run for the same sample; a stop has none."""

    function: Callable[[Sequence[int], Sequence[int]], float]  #: (token ids, full-depth token ids) -> 0..highest
    highest: float = 1.0
    by_default: bool = True


def _release(package: str, parts: int) -> str:
    """`rapidfuzz-3`: what decides about a score in the package that computes it."""
    return f"{package}-{'.'.join(installed(package).split('.')[:parts])}"


_RAPIDFUZZ, _SACREBLEU = _release("rapidfuzz", 1), _release("sacrebleu", 1)
_UNBOUNDED = float("inf")

_BUILTIN: list[TextMetric | TokenMetric | ExecutedMetric] = [
    TextMetric("em", "em@1", "exact match, trailing white space stripped", text.em),
    TextMetric("em_line", "em_line@1", "exact match of the first line", text.em_line),
    TextMetric("es", f"es@{_RAPIDFUZZ}", "edit similarity, 0..1", text.es, of_many=text.es_of_many),
    TextMetric("rouge_l", "rouge_l@rouge_score-0.1+code-1", "ROUGE-L F over code tokens", text.rouge_l),
    TextMetric("accepted", "accepted@em_line-1", "offline proxy of acceptance: the first line matches", text.accepted),
    TokenMetric("token_agreement", "token_agreement@1", "share of tokens equal to full depth", token_agreement),
    TokenMetric("exact_agreement", "exact_agreement@1", "completions equal to full depth in full", exact_agreement),
    TextMetric(
        "em_codexglue",
        "em_codexglue@1",
        "CodeXGLUE's exact match, literals post-processed, token by token",
        codexglue.em_codexglue,
        by_default=False,
    ),
    TextMetric(
        "es_codexglue",
        f"es_codexglue@{_RAPIDFUZZ}",
        "CodeXGLUE's edit similarity, whole percent, 0..100",
        codexglue.es_codexglue,
        highest=100,
        by_default=False,
    ),
    TextMetric(
        "rouge_l_default",
        "rouge_l_default@rouge_score-0.1",
        "ROUGE-L F over [a-z0-9]+ as rouge_score reports it: blind to operators",
        text.rouge_l_default,
        by_default=False,
    ),
    TextMetric(
        "bleu", f"bleu@{_SACREBLEU}", "sacrebleu's sentence BLEU, effective order, 0..100", text.bleu, 100, False
    ),
    TextMetric("chrf", f"chrf@{_SACREBLEU}", "sacrebleu's sentence chrF, 0..100", text.chrf, 100, False),
    TextMetric(
        "identifier_f1", "identifier_f1@2", "F1 over the identifiers of the code", text.identifier_f1, by_default=False
    ),
    TextMetric(
        "accepted_loose",
        f"accepted_loose@{_RAPIDFUZZ}",
        "offline proxy of acceptance: edit similarity of the first line at least 0.9",
        text.accepted_loose,
        by_default=False,
    ),
    TextMetric(
        "accepted_chars",
        "accepted_chars@1",
        "characters of the reference's first line that the completion begins with",
        text.accepted_chars,
        highest=_UNBOUNDED,
        by_default=False,
    ),
    TokenMetric(
        "first_divergence",
        "first_divergence@1",
        "index of the first token that differs from full depth, or how many there are",
        first_divergence,
        highest=_UNBOUNDED,
        by_default=False,
    ),
    ExecutedMetric("pass@1", "pass@1@sandbox-1", "the completion passes its sample's test, executed", pass_at_1),
]

metrics: Registry[TextMetric | TokenMetric | ExecutedMetric] = Registry(
    "metric", "metrics", {metric.name: metric for metric in _BUILTIN}
)


def wanted_metrics(names: Iterable[str] | None) -> list[str]:
    """The names themselves, `all` being every metric that executes nothing; without names those computed by default."""
    if names is None:
        return [name for name, metric in metrics.items() if metric.by_default]
    harmless = [name for name, metric in metrics.items() if not isinstance(metric, ExecutedMetric)]
    return list(dict.fromkeys(one for name in names for one in (harmless if name == "all" else [name])))


def executed_metrics(names: Iterable[str]) -> list[str]:
    """Those among the names that execute completions. Raises `UnknownName`."""
    return [name for name in names if isinstance(metrics[name], ExecutedMetric)]


def score_execution(names: Iterable[str], prompt: str, prediction: str, test: str | None) -> dict[str, float]:
    """The executed metrics among the names; none where the sample has no test. Raises `UnknownName`, `BadInput`."""
    if test is None:
        return {}
    known = (metrics[name] for name in names)
    return {one.name: one.function(prompt, prediction, test) for one in known if isinstance(one, ExecutedMetric)}


def score_text(names: Iterable[str], prediction: str, reference: str) -> dict[str, float]:
    """The text metrics among the names; those over tokens are passed over. Raises `UnknownName`.

    `prediction` and `reference` are cut at the end that their benchmark sets a completion.
    """
    known = (metrics[name] for name in names)
    return {metric.name: metric.function(prediction, reference) for metric in known if isinstance(metric, TextMetric)}


def score_texts(
    names: Iterable[str], predictions: Sequence[str], references: Sequence[str]
) -> dict[str, Sequence[float]]:
    """`score_text` of many pairs: by metric, a value a pair, in their order. Raises `UnknownName`."""
    known = [metric for metric in map(metrics.__getitem__, names) if isinstance(metric, TextMetric)]
    return {metric.name: _values(metric, predictions, references) for metric in known}


def _values(metric: TextMetric, predictions: Sequence[str], references: Sequence[str]) -> Sequence[float]:
    if metric.of_many is not None:
        return metric.of_many(predictions, references)
    return list(map(metric.function, predictions, references))


def score_tokens(names: Iterable[str], token_ids: Sequence[int], full_token_ids: Sequence[int]) -> dict[str, float]:
    """The token metrics among the names; those over text are passed over. Raises `UnknownName`."""
    known = (metrics[name] for name in names)
    return {
        metric.name: metric.function(token_ids, full_token_ids) for metric in known if isinstance(metric, TokenMetric)
    }
