"""What is written behind a wrong token, and behind a right one: completions are generated from both.

Of a sample at most one token of each is taken by chance: one that every exit point gets wrong, with what full depth
chose in its place, and one that full depth gets right. Full depth goes on from there.
"""

import json
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.confirming import OnLive, see_done
from cluster.rescoring import rescore
from cluster.settings import Settings
from cluster.spec import parse_job
from cluster.study.counting import Share, share
from cluster.study.kinds import text_before
from cluster.traced import Trace
from db import jobs, labels
from db.records import CompletionRow, JobState, SampleRow, TracedSample
from db.results import completions, samples_of
from engine.errors import BadInput

if TYPE_CHECKING:
    from cluster.reports.examples import Decode

ARMS = ("wrong", "right")
#: metrics of the text behind the token against the reference's: none is a judgement of the whole
REST = ("accepted", "es")
#: what people said of the completions, where they did
LABELS = "acceptance_rate"


@dataclass(frozen=True)
class Arm:
    """Completions continued from a wrong token, or from a right one."""

    arm: str
    completions: int
    #: shares and means over completions: `accepted` and `es` of what stands behind the token, `pass@1` of the whole,
    #: and `acceptance_rate` over those that somebody judged
    scores: dict[str, Share]


@dataclass(frozen=True)
class Continued:
    """Both, from one job of the record, which labels can be given to as to any other."""

    job_id: int
    wrong: Arm
    right: Arm
    left_out: int | None  #: drawn tokens that nothing can be written behind; None where this job is looked at again


def continue_from_tokens(
    trace: Trace,
    decode: "Decode | None",
    samples: int,
    settings: Settings,
    *,
    execute: bool = False,
    inline: bool = False,
    on_live: OnLive = lambda now: None,
) -> Continued:
    """Generate from the tokens of so many samples. execute: run the tests of samples that have some.

    Raises `BadInput` where the trace is not of references or the tokenizer is not here.
    """
    decode = check_continued(trace, decode)
    spec, of = dict(jobs.job(trace.db, trace.run.job_id).spec), jobs.benchmark(trace.db, trace.run.benchmark_id)
    records, left_out = _records(trace, decode, samples, of.ends == "line")
    has_tests = bool(records) and all("test" in record for record in records)
    if execute and not has_tests:
        raise BadInput(f"benchmark {trace.run.benchmark!r} has no tests to execute; leave --execute out.")
    if {record["arm"] for record in records} != {*ARMS}:
        raise BadInput("continue: no token can be continued from; trace a benchmark with longer references.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "continued.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        benchmark = {"jsonl": str(file), "id": "id", "group": "group", "ends": of.ends, "name": "continued"}
        benchmark |= {"language": records[0]["language"]} | ({"test": "test"} if has_tests else {})
        spec |= {
            "trace": None,
            "name": _job_name(trace),
            "exits": None,
            "benchmarks": [benchmark],
            "policies": ["full"],
            "metrics": [*REST],
        }
        go_on = (
            f"go on with `shortstop resume {{job_id}}`, and then with "
            f"`shortstop study {trace.run.job_id} --continued {{job_id}}`"
        )
        job_id = see_done(trace.db, parse_job(spec), settings, inline=inline, on_live=on_live, go_on=go_on)
    if execute:
        rescore(trace.db, job_id, ["pass@1"], execute=True)
    return _found(trace, job_id, left_out)


def check_continued(trace: Trace, decode: "Decode | None") -> "Decode":
    """Whether there are wrong tokens to go on from, and a tokenizer. Raises `BadInput`."""
    if trace.target != "reference":
        raise BadInput(
            f"job {trace.run.job_id} is a trace of full depth's own completions, in which no token is wrong; trace the "
            "references, or leave --continue out."
        )
    if decode is None:
        raise BadInput(f"model {trace.pinned.model!r}: its tokenizer is not on this machine; fetch the model first.")
    return decode


def read_continued(trace: Trace, job_id: int) -> Continued:
    """What an earlier call of `continue_from_tokens` made, with the labels that people have given to it since.

    Raises `Missing`, and `BadInput` where the job is something else, or not done.
    """
    job = jobs.job(trace.db, job_id)
    if job.name != _job_name(trace):
        raise BadInput(
            f"job {job_id} ({job.name!r}) does not continue the trace of job {trace.run.job_id} on "
            f"{trace.run.benchmark!r}; make one that does with --continue N."
        )
    if job.state is not JobState.DONE:
        raise BadInput(f"job {job_id} is {job.state}; wait, or resume it.")
    return _found(trace, job_id, None)


def _job_name(trace: Trace) -> str:
    return f"study {trace.run.job_id} of {trace.run.benchmark}, continued"


def _found(trace: Trace, job_id: int, left_out: int | None) -> Continued:
    found = [row for row in completions(trace.db, job_id=job_id, with_tokens=False) if row.outcome.error is None]
    accepted = {one.sample_id: one.accepted for one in labels.judged(trace.db, job_id)}
    wrong, right = (_arm(arm, [row for row in found if row.sample.name.endswith(f" {arm}")], accepted) for arm in ARMS)
    return Continued(job_id, wrong, right, left_out)


def _records(trace: Trace, decode: "Decode", samples: int, line: bool) -> tuple[list[dict[str, Any]], int]:
    """The samples to generate from, as JSON lines; and how many drawn tokens end the completion already."""
    draw = random.Random(f"{trace.pinned.seed} study")
    found: list[dict[str, Any]] = []
    left_out = taken = 0
    every = max(1, jobs.benchmark(trace.db, trace.run.benchmark_id).n_samples // samples)
    for place, (one, row) in enumerate(_samples(trace)):
        if place % every or taken == samples:
            continue
        taken += 1
        for arm in ARMS:
            step = _drawn(one, arm, draw)
            if step is None:
                continue
            record = _record(one, row, decode, step, arm, line)
            left_out += record is None
            found += [] if record is None else [record]
    return found, left_out


def _drawn(one: TracedSample, arm: str, draw: random.Random) -> int | None:
    right = one.arrays.tokens == one.arrays.targets
    chosen = np.flatnonzero(~right.any(0) if arm == "wrong" else right[-1])
    return draw.choice(chosen.tolist()) if len(chosen) else None


def _record(
    one: TracedSample, row: SampleRow, decode: "Decode", step: int, arm: str, line: bool
) -> dict[str, Any] | None:
    """None where nothing can stand behind the token."""
    targets = one.arrays.targets.tolist()
    pieces = decode(targets)
    [token] = decode([int(one.arrays.tokens[-1, step])])
    before = text_before(row.prompt, "".join(pieces)) + "".join(pieces[:step])
    right_so_far, whole = before + pieces[step], row.prompt + row.reference
    rest = whole[len(right_so_far) :]
    is_end = (line and "\n" in token) or (token.startswith("<|") and token.endswith("|>"))
    # half a character is no text, and a text that does not go on as the reference has another boundary
    if is_end or not rest.strip() or "\ufffd" in before + token or not whole.startswith(right_so_far):
        return None
    record = {
        "id": f"{one.name} {step + 1} {arm}",
        "arm": arm,
        "group": one.source_group,
        "language": one.language,
        "prompt": before + token,
        "reference": rest,
    }
    return record if row.test is None else record | {"test": row.test}


def _samples(trace: Trace) -> Iterator[tuple[TracedSample, SampleRow]]:
    for window in trace.samples():
        rows = samples_of(trace.db, trace.run.benchmark_id, window[0].position, window[-1].position + 1)
        by_id = {row.id: row for row in rows}
        yield from ((one, by_id[one.sample_id]) for one in window)


def _arm(arm: str, rows: Sequence[CompletionRow], accepted: Mapping[int, float]) -> Arm:
    """accepted: by sample the share of its judges who accept what was written."""
    groups = {name: place for place, name in enumerate(sorted({row.sample.source_group for row in rows}))}
    group = np.array([groups[row.sample.source_group] for row in rows], int)
    whole = np.bincount(group, minlength=len(groups))
    names = sorted({name for row in rows for name in row.scores})
    scores = {
        name: share(np.bincount(group, [row.scores.get(name, 0.0) for row in rows], len(groups)), whole)
        for name in names
        if rows
    }
    judged = np.array([row.sample.id in accepted for row in rows], bool)
    if judged.any():
        said = [accepted.get(row.sample.id, 0.0) for row in rows]
        scores[LABELS] = share(np.bincount(group, said, len(groups)), np.bincount(group, judged, len(groups)))
    return Arm(arm, len(rows), scores)


def named(metric: str) -> str:
    """A metric's name in tables of continuations."""
    if metric == LABELS:
        return "accepted by people"
    return metric if metric == "pass@1" else f"{metric} of the rest (proxy)"


def judged_by(found: Continued) -> str:
    """What the numbers of continuations are, and are not."""
    rest = "accepted and es hold only the text behind the token against the reference's"
    scores = {*found.wrong.scores, *found.right.scores}
    of_the_whole = ["pass@1 is of the whole program"] * ("pass@1" in scores)
    of_the_whole += [f"people judged what stands behind the token, as `shortstop report {found.job_id}` tells"] * (
        LABELS in scores
    )
    if of_the_whole:
        return f"{'; '.join(of_the_whole)}; {rest}."
    return (
        f"nobody judged the completions, and none was executed: {rest}, and a line with a wrong token in it never "
        "equals the reference."
    )
