"""Where the tokens of a trace become right: by language, kind of token and position, and how far exits agree."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import t as student

from cluster.study.kinds import KINDS, kinds_of, text_before
from cluster.traced import Trace
from db.records import TracedSample
from db.results import samples_of
from engine.errors import BadInput
from engine.replay.figures import FEWEST_GROUPS
from engine.replay.traced import Array

if TYPE_CHECKING:
    from cluster.reports.examples import Decode

#: samples at a time
_WINDOW = 256
#: positions up to which each has a row of its own; behind them a row is as long as all before it
_SINGLE = 16


@dataclass(frozen=True)
class Share:
    """A share of tokens, with its 95 % interval over source groups; None under six groups."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Slice:
    """Some tokens: p exit points, full depth the last."""

    name: str
    tokens: int
    first_right: list[Share]  #: [p] of all tokens those that this point is the first to get right
    right: list[Share]  #: [p] that it gets right
    never: Share  #: wrong at every point


@dataclass(frozen=True)
class Counted:
    """What a trace says before anything is generated."""

    points: tuple[int, ...]
    samples: int
    groups: int
    overall: Slice
    languages: list[Slice]
    kinds: list[Slice]
    positions: list[Slice]
    agreement: list[list[float]]  #: [p][p] share of tokens for which two points choose the same


def count(trace: Trace, decode: "Decode | None", on_progress: Callable[[int], None] = lambda samples: None) -> Counted:
    """Count over all tokens of a trace. decode: texts of token ids; without them kinds are left out."""
    p, groups = len(trace.points), {name: place for place, name in enumerate(trace.groups)}
    sums: dict[tuple[str, str], Array] = {}
    agreement, samples = np.zeros((p, p)), 0
    for window in trace.samples(_WINDOW):
        tokens = np.concatenate([one.arrays.tokens for one in window], axis=1)
        lengths = [len(one.arrays) for one in window]
        rows = _rows(tokens == np.concatenate([one.arrays.targets for one in window]))
        group = np.repeat([groups[one.source_group] for one in window], lengths)
        labels = {
            "all": np.full(len(rows), "all", object),
            "language": np.repeat(np.array([one.language for one in window], object), lengths),
            "position": np.concatenate([_places(length) for length in lengths]),
        }
        if decode is not None:
            labels["kind"] = np.array(list(_kinds(trace, window, decode)), object)
        for what, names in labels.items():
            for name in np.unique(names.astype(str)):
                here = names == name
                own = sums.setdefault((what, str(name)), np.zeros((len(groups), rows.shape[1])))
                np.add.at(own, group[here], rows[here])
        agreement += (tokens[:, None] == tokens[None]).sum(2)
        samples += len(window)
        on_progress(samples)
    if not samples:
        raise BadInput(f"job {trace.run.job_id}: its trace of {trace.run.benchmark!r} has no tokens.")
    total = sums["all", "all"]
    return Counted(
        points=trace.points,
        samples=samples,
        groups=len(groups),
        overall=_slice("all", total, p),
        languages=_slices(sums, "language", p),
        kinds=sorted(_slices(sums, "kind", p), key=lambda one: KINDS.index(one.name)),
        positions=sorted(_slices(sums, "position", p), key=lambda one: int(one.name.split("–")[0])),
        agreement=(agreement / total[:, 0].sum()).tolist(),
    )


def _rows(right: Array) -> Array:
    """[n, 2 p + 2] of each token: 1, whether each point is the first right one, whether none is, whether each is."""
    p, n = right.shape
    first = np.where(right.any(0), right.argmax(0), p)
    ones = np.zeros((n, 2 * p + 2))
    ones[:, 0] = 1
    ones[np.arange(n), 1 + first] = 1
    ones[:, 2 + p :] = right.T
    return ones


def _places(length: int) -> Array:
    """Names of the positions in a target, from 1: each by itself at first, then together."""
    names = []
    for place in range(1, length + 1):
        low = _SINGLE * 2 ** int(np.log2((place - 1) // _SINGLE)) if place > _SINGLE else 0
        names.append(f"{low + 1}–{2 * low}" if low else str(place))
    return np.array(names, object)


def _kinds(trace: Trace, window: list[TracedSample], decode: "Decode") -> Iterator[str]:
    for one, prompt in with_prompts(trace, window):
        pieces = decode(one.arrays.targets.tolist())
        yield from kinds_of(text_before(prompt, "".join(pieces)), pieces, one.language)


def with_prompts(trace: Trace, window: list[TracedSample]) -> Iterator[tuple[TracedSample, str]]:
    """Traced samples with their prompts."""
    rows = samples_of(trace.db, trace.run.benchmark_id, window[0].position, window[-1].position + 1)
    prompts = {row.id: row.prompt for row in rows}
    return ((one, prompts[one.sample_id]) for one in window)


def _slices(sums: dict[tuple[str, str], Array], what: str, p: int) -> list[Slice]:
    found = [_slice(name, own, p) for (kind, name), own in sums.items() if kind == what]
    return sorted(found, key=lambda one: -one.tokens)


def _slice(name: str, sums: Array, p: int) -> Slice:
    tokens = sums[:, 0]
    shares = [share(sums[:, column], tokens) for column in range(1, sums.shape[1])]
    return Slice(name, int(tokens.sum()), shares[:p], shares[p + 1 :], shares[p])


def share(part: Array, whole: Array) -> Share:
    """A ratio of sums over groups; its interval is linearised, as in `engine.replay.figures`."""
    part, whole = part[whole > 0], whole[whole > 0]
    value, n = float(part.sum() / whole.sum()), len(whole)
    if n < FEWEST_GROUPS:
        return Share(value, None, None)
    spread = np.sqrt(((part - value * whole) ** 2).sum() * n / (n - 1)) / whole.sum()
    half = float(student.ppf(0.975, n - 1) * spread)
    return Share(value, max(value - half, 0.0), min(value + half, 1.0))
