"""`make bench-scoring`: how long the text metrics take on one core, over lines like those that are completed."""

import inspect
import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from itertools import islice

from tests.bench.measure import Row, printed, summarise, write
from workers.scoring.metrics import TextMetric, metrics, score_text, score_texts

COMPLETIONS = 100_000
PARTS = 5


def pairs(count: int) -> tuple[list[str], list[str]]:
    """Substantive lines of real code, each held against the one before it and, every third time, against itself."""
    lines = [line for module in (inspect, subprocess, os) for line in inspect.getsource(module).split("\n") if line]
    references = [line for _, line in islice(enumerate(lines * (count // len(lines) + 1)), count)]
    return [line if place % 3 == 0 else references[place - 1] for place, line in enumerate(references)], references


def processor_seconds(score: Callable[[slice], object], part: slice) -> float:
    """Of one call."""
    start = time.process_time()
    score(part)
    return time.process_time() - start


def rows() -> list[Row]:
    """All text metrics together, as a worker and as `score_texts` calls them, then each alone."""
    names = [name for name, metric in metrics.items() if isinstance(metric, TextMetric)]
    predictions, references = pairs(COMPLETIONS)
    score_texts(names, predictions[:100], references[:100])

    def one_by_one(part: slice) -> None:
        for prediction, reference in zip(predictions[part], references[part], strict=True):
            score_text(names, prediction, reference)

    def taken(score: Callable[[slice], object], limit: float | None = None, name: str = "all text metrics") -> Row:
        """Processor seconds for all, from each of five parts: what one core takes, whoever shares it."""
        size = COMPLETIONS // PARTS
        parts = [slice(first, first + size) for first in range(0, COMPLETIONS, size)]
        return summarise(name, [PARTS * processor_seconds(score, part) for part in parts], "s", at_most=limit)

    def at_once(part: slice, chosen: list[str] = names) -> None:
        score_texts(chosen, predictions[part], references[part])

    return [
        taken(one_by_one, 90, "all text metrics, 100,000 completions, one by one"),
        taken(at_once, 90, "all text metrics, 100,000 completions, at once"),
        *(taken(partial(at_once, chosen=[name]), name=f"{name}, 100,000 completions") for name in names),
    ]


def main() -> None:
    """Print the table and write it to build/bench/scoring.json."""
    write("scoring", printed(rows()))


if __name__ == "__main__":
    main()
