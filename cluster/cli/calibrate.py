"""`shortstop calibrate`: the fastest thresholds that keep a promise."""

from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.options import DatabaseUrl, Inline, JobId, JsonFlag, Workers
from cluster.cli.output import note, print_json, print_table
from cluster.cli.start import opened, start, writable
from cluster.cli.traces import BenchmarkName, Policies, asked_policies
from engine.errors import BadInput

if TYPE_CHECKING:
    from cluster.calibrate.found import Calibrated, Candidate

MaxDisagree = Annotated[
    float | None,
    typer.Option("--max-disagree", metavar="SHARE", help="Completions that may differ from full depth's, as 0.05."),
]
Metric = Annotated[
    str | None, typer.Option("--metric", metavar="NAME", help="What --max-loss is counted in, like rouge_l.")
]
MaxLoss = Annotated[
    float | None, typer.Option("--max-loss", metavar="LOSS", help="What the metric may be below full depth's.")
]
Confidence = Annotated[float, typer.Option("--confidence", metavar="SHARE", help="That the promise is kept.")]
PolicyFile = Annotated[
    str | None,
    typer.Option("--out", metavar="FILE", help="Write a spec with policy and evidence, for `shortstop run`."),
]
#: rows of a table on a terminal; JSON has all
_MOST_ROWS = 20


def calibrate(
    job: JobId,
    max_disagree: MaxDisagree = None,
    metric: Metric = None,
    max_loss: MaxLoss = None,
    confidence: Confidence = 0.95,
    policy: Policies = None,
    benchmark: BenchmarkName = None,
    out: PolicyFile = None,
    workers: Workers = None,
    inline: Inline = False,
    database: DatabaseUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """The fastest thresholds that keep a promise, by a trace; exit code 1 where none does, 3 where more data may."""
    from cluster.calibrate.policy_file import sentence, write_policy_file
    from cluster.cli.progress import show_job, watch
    from cluster.traced import trace_of

    _check(max_disagree, metric, max_loss, confidence)
    file = writable(out)
    settings = start(database, workers)
    with opened(settings, create=False) as db:
        trace = trace_of(db, job, benchmark)
        with watch() as shown:

            def show(done: int, of: int) -> None:
                shown.show("replaying", done, of, "tokens")

            if max_disagree is not None:
                from cluster.calibrate.agreement import calibrate_agreement, default_grid

                asked = asked_policies(policy or [], default_grid(trace.pinned.controller))
                made = calibrate_agreement(
                    trace, asked, max_disagree=max_disagree, confidence=confidence, on_progress=show
                )
            else:
                from cluster.calibrate.quality import calibrate_quality
                from cluster.grids import default_policies

                assert metric is not None
                assert max_loss is not None
                asked = asked_policies(policy or [], default_policies(trace.pinned))
                made = calibrate_quality(
                    db,
                    trace,
                    asked,
                    metric=metric,
                    max_loss=max_loss,
                    confidence=confidence,
                    settings=settings,
                    inline=inline,
                    on_progress=show,
                    on_live=lambda now: show_job(shown, now),
                )
        if file is not None and made.chosen is not None:
            write_policy_file(made, trace, file)
            note(f"policy written to {file}; run it with `shortstop run {file}`")
    if as_json:
        print_json(made.as_json())
    else:
        _print(made)
    if made.chosen is None:
        note(f"shortstop: {refusal(made)}")
        raise typer.Exit(3 if made.undecided else 1)
    note(sentence(made))


def _check(max_disagree: float | None, metric: str | None, max_loss: float | None, confidence: float) -> None:
    """Raises `BadInput`."""
    if (max_disagree is None) == (max_loss is None):
        raise BadInput("calibrate: give one promise, --max-disagree SHARE or --metric NAME with --max-loss LOSS.")
    if (max_loss is None) != (metric is None):
        raise BadInput("calibrate: --metric and --max-loss go together; give both, or --max-disagree.")
    if max_disagree is not None and not 0 < max_disagree < 1:
        raise BadInput(f"max-disagree is {max_disagree:g}; give a share between 0 and 1, like 0.05.")
    if not 0 < confidence < 1:
        raise BadInput(f"confidence is {confidence:g}; give a share between 0 and 1, like 0.95.")
    if metric is not None and max_loss is not None:
        from cluster.calibrate.quality import check_metric

        highest = check_metric(metric)
        if not 0 < max_loss < highest:
            raise BadInput(
                f"max-loss is {max_loss:g}; {metric} reaches {highest:g}, so give a loss between 0 and that."
            )


def refusal(made: "Calibrated") -> str:
    """Why nothing is promised, what comes closest, and how many groups would do."""
    closest = made.closest
    if closest is None:
        return "no policy was given that could keep the promise."
    speed = "–" if closest.speedup is None else f"{closest.speedup:.2f}×"
    if not closest.faster:
        return (
            f"nothing is promised: no policy is faster than full depth; {closest.policy} comes closest at {speed}. "
            "Ask for other policies, or other exits."
        )
    if closest.loss is None or closest.groups_that_would_do is None:
        return (
            f"nothing is promised: {closest.policy} comes closest, with a loss of {closest.loss:.4f} where "
            f"{made.bound:g} is allowed; no number of source groups would do. Allow more, or ask for safer policies."
        )
    return (
        f"nothing is promised: {closest.policy} comes closest, with a loss of {closest.loss:.4f} on {made.groups:,} "
        f"source groups; about {closest.groups_that_would_do:,} like them would do."
    )


def _print(made: "Calibrated") -> None:
    from cluster.reports import formats as f

    shown = sorted(made.tried, key=lambda one: (not one.kept, -(one.speedup or 0)))[:_MOST_ROWS]
    print(
        f"job {made.job_id}, {made.benchmark}: {len(made.tried):,} policies, {made.groups:,} source groups, "
        f"{made.samples:,} samples" + (f", live in job {made.live_job}" if made.live_job else "") + "\n"
    )
    columns = ["", "policy", "speed", "loss", "p", "promised", "groups that would do"]
    print_table(
        columns,
        [
            [
                "*" if one == made.chosen else "",
                one.policy,
                f.times(one.speedup),
                _number(one.loss),
                _p(one),
                "yes" if one.kept else "no",
                f.count(one.groups_that_would_do),
            ]
            for one in shown
        ],
    )
    if made.promise is not None and made.promise.held_out is not None:
        held = made.promise.held_out
        interval = "" if held.low is None else f" ({held.low:.4f} to {held.high:.4f})"
        print(f"\nloss on {held.groups:,} groups that had no part in the choice: {held.loss:.4f}{interval}")
    print()


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _p(one: "Candidate") -> str:
    return "–" if one.p_value is None else f"{one.p_value:.2g}"
