"""A study of one benchmark: all that is known of it, as plain values."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from cluster.settings import Settings
from cluster.study.continued import Continued, continue_from_tokens
from cluster.study.counting import Counted, count
from cluster.traced import Trace


@dataclass(frozen=True)
class Study:
    """What a trace says of a model, its exits and a benchmark."""

    job_id: int
    benchmark: str
    model: str
    exits: str | None
    target: str  #: reference, or full
    n_layers: int
    counted: Counted
    continued: Continued | None  #: None where nothing was generated

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def study(
    trace: Trace,
    settings: Settings,
    *,
    continue_samples: int | None = None,
    execute: bool = False,
    inline: bool = False,
    on_progress: Callable[[int], None] = lambda samples: None,
) -> Study:
    """Count a trace, and generate from wrong and right tokens of so many samples where that is asked for.

    Raises `BadInput`.
    """
    from cluster.reports.decoder import decoder

    decode = decoder(trace.db, trace.run.job_id)
    counted = count(trace, decode, on_progress)
    continued = None
    if continue_samples is not None:
        continued = continue_from_tokens(trace, decode, continue_samples, settings, execute=execute, inline=inline)
    pinned = trace.pinned
    return Study(
        trace.run.job_id,
        trace.run.benchmark,
        pinned.model,
        pinned.exits,
        trace.target,
        pinned.n_layers,
        counted,
        continued,
    )
