"""A study of one benchmark: all that is known of it, as plain values."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from cluster.confirming import OnLive
from cluster.settings import Settings
from cluster.study.continued import Continued, check_continued, continue_from_tokens, read_continued
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
    continued_job: int | None = None,
    execute: bool = False,
    inline: bool = False,
    on_progress: Callable[[int], None] = lambda samples: None,
    on_live: OnLive = lambda now: None,
) -> Study:
    """Count a trace, and generate from wrong and right tokens of so many samples where that is asked for.

    continued_job: one that was generated before, in its place. Raises `BadInput`.
    """
    from cluster.reports.decoder import decoder

    continued = None if continued_job is None else read_continued(trace, continued_job)
    decode = decoder(trace.db, trace.run.job_id)
    if continue_samples is not None:
        check_continued(trace, decode)
    counted = count(trace, decode, on_progress)
    if continue_samples is not None:
        continued = continue_from_tokens(
            trace, decode, continue_samples, settings, execute=execute, inline=inline, on_live=on_live
        )
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
