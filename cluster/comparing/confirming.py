"""A failed gate is asked again before anybody is woken: quality on fresh samples, speed by a rerun."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster.comparing.noise import SAME
from cluster.gates import Gate, Outcome, RuleVerdict, Verdict, concluded, decide
from cluster.service import JobDetails, Service
from cluster.spec import JobSpec
from db.records import JobState
from engine.errors import BadInput

#: one-sided; a loss that was found with the gate's confidence shows again at this level
AGAIN = 0.05


@dataclass(frozen=True)
class Again:
    """Jobs that ask again for the rules of one kind that failed."""

    kind: Literal["quality", "speed"]
    before: JobSpec | None  #: A on fresh samples; None where A stays: of a rerun, and of a job held against itself
    after: JobSpec


def again(service: Service, verdict: Verdict) -> list[Again]:
    """What would confirm the failures of a verdict. Quality is left out where its benchmarks have no more samples."""
    found = []
    after = service.job(verdict.job_b)
    is_alone = verdict.job_a == verdict.job_b
    quality = {one.benchmark for one in verdict.failed if one.kind == "quality"}
    if quality and (spec := _fresh(after, quality)) is not None:
        before = None if is_alone else _fresh(service.job(verdict.job_a), quality)
        if is_alone or before is not None:
            found.append(Again("quality", before, spec))
    speed = {one.benchmark for one in verdict.failed if one.kind == "speed"}
    if speed:
        found.append(Again("speed", None, _with(after, speed, "rerun", lambda asked: asked)))
    return found


def settle(
    service: Service, gate: Gate, verdict: Verdict, asked: Again, before_id: int | None, after_id: int
) -> Verdict:
    """The verdict after the jobs of `asked` are done.

    before_id: None where `asked.before` is. A failure that shows again stays one; one that certainly does not is none;
    what lies between is inconclusive.
    """
    failed = [one for one in verdict.failed if one.kind == asked.kind]
    what = "on fresh samples" if asked.kind == "quality" else "in a rerun"
    complaint = _other(service, verdict.job_b, after_id)
    if complaint is None and before_id is not None:
        complaint = _other(service, verdict.job_a, before_id)
    if complaint is not None:
        return _told(gate, verdict, verdict.rules, f"Not confirmed: {complaint}")
    try:
        second = decide(_only(gate, failed), _compared(service, gate, verdict, asked, before_id, after_id))
    except BadInput as error:
        return _told(gate, verdict, verdict.rules, f"Not confirmed {what}: {error}")
    judged = [_settled(one, second.rules, what) if one in failed else one for one in verdict.rules]
    stood = sum(one.outcome is Outcome.FAIL for one in judged if one.kind == asked.kind)
    jobs = f"jobs {before_id} and {after_id}" if before_id is not None else f"job {after_id}"
    return _told(gate, verdict, judged, f"Asked again {what} ({jobs}): {stood} of {len(failed)} failures show again.")


def confirm(service: Service, gate: Gate, verdict: Verdict, see: Callable[[int], JobState]) -> Verdict:
    """Run what confirms the failures of a verdict, and settle it. see: works on a job, or waits for it, to its end."""
    asked = again(service, verdict)
    kinds = {one.kind for one in asked}
    for one in asked:
        try:
            ids = [None if spec is None else service.submit(spec) for spec in (one.before, one.after)]
        except ValueError as error:  # BadInput of engine and record: what the first jobs read is gone, or not allowed
            verdict = _told(gate, verdict, verdict.rules, f"Not confirmed: {error}")
            continue
        states = [see(job_id) for job_id in ids if job_id is not None]
        if any(state is not JobState.DONE for state in states):
            verdict = _told(gate, verdict, verdict.rules, f"Not confirmed: job {ids[1]} or its fellow is {states[-1]}.")
            continue
        assert ids[1] is not None
        verdict = settle(service, gate, verdict, one, ids[0], ids[1])
    if any(one.kind == "quality" for one in verdict.failed) and "quality" not in kinds:
        verdict = _told(
            gate,
            verdict,
            verdict.rules,
            "Not confirmed: the benchmark has no samples beside those it drew.",
        )
    return verdict


# --- specs ------------------------------------------------------------------------------------------------------------


def _fresh(job: JobDetails, benchmarks: set[str]) -> JobSpec | None:
    """The job's spec with as many other samples of these benchmarks; None where one of them takes all there are."""

    def other_draw(asked: Any) -> Any:
        changes = {"seed": asked.seed + 1}
        if getattr(asked, "name", None) is not None:  # under that name its content may not change
            changes["name"] = f"{asked.name} seed={asked.seed + 1}"
        return asked.model_copy(update=changes)

    spec = _with(job, benchmarks, "fresh samples", other_draw)
    return None if any(asked.samples is None for asked in spec.benchmarks) else spec


def _with(job: JobDetails, benchmarks: set[str], why: str, change: Callable[[Any], Any]) -> JobSpec:
    """The spec of a job with these of its benchmarks only."""
    spec = JobSpec.model_validate(job.job.spec)
    names = list((job.job.pinned or {}).get("benchmarks", {}))  # in the spec's order
    kept = [change(asked) for name, asked in zip(names, spec.benchmarks, strict=False) if name in benchmarks]
    name = f"{spec.name} ({why})"
    return spec.model_copy(update={"benchmarks": kept, "name": name})


# --- settling ---------------------------------------------------------------------------------------------------------


def _compared(
    service: Service, gate: Gate, verdict: Verdict, asked: Again, before_id: int | None, after_id: int
) -> Any:
    """The comparison that is judged again, its benchmarks under the names that the verdict has."""
    first = verdict.job_a if before_id is None else before_id
    is_alone = verdict.job_a == verdict.job_b
    levels = sorted({rule.metric for rule in gate.rules if rule.min is not None})
    found = service.compare(
        str(after_id) if is_alone else str(first),
        None if is_alone else str(after_id),
        confidence=gate.two_sided,
        levels=levels,
        without=verdict.job_b if asked.kind == "quality" else None,
    )
    names = _names(service.job(verdict.job_b), {one.benchmark for one in verdict.failed if one.kind == asked.kind})
    theirs = list((service.job(after_id).job.pinned or {}).get("benchmarks", {}))
    renamed = dict(zip(theirs, names, strict=True))
    pairs = [pair.model_copy(update={"benchmark": renamed.get(pair.benchmark, "")}) for pair in found.pairs]
    kept = [pair for pair in pairs if pair.benchmark]
    return found.model_copy(update={"pairs": kept})


def _names(job: JobDetails, benchmarks: set[str]) -> list[str]:
    return [name for name in (job.job.pinned or {}).get("benchmarks", {}) if name in benchmarks]


def _other(service: Service, first_id: int, second_id: int) -> str | None:
    """Why the second job is not the first one done again; None where it is."""
    first, second = service.job(first_id).job.pinned or {}, service.job(second_id).job.pinned or {}
    differ = [name for name in SAME if first.get(name) != second.get(name)]
    if not differ:
        return None
    return f"{', '.join(differ)} of job {second_id} {'is' if len(differ) == 1 else 'are'} not as in job {first_id}."


def _settled(one: RuleVerdict, second: Sequence[RuleVerdict], what: str) -> RuleVerdict:
    key = (one.metric, one.benchmark, one.policy, one.limit, one.device_class)
    found = next((o for o in second if (o.metric, o.benchmark, o.policy, o.limit, o.device_class) == key), None)
    if found is None or found.value.value is None or found.value.low is None:
        return one.model_copy(update={"sentence": f"{one.sentence} There were too few to ask again {what}."})
    if _shows_again(found):
        return one.model_copy(update={"sentence": f"{one.sentence} It shows again {what}."})
    outcome = Outcome.PASS if found.outcome is Outcome.PASS else Outcome.INCONCLUSIVE
    does_not = "It does not show again" if outcome is Outcome.PASS else "It does not show clearly again"
    sentence = f"{one.sentence} {does_not} {what}: {found.sentence}"
    return one.model_copy(update={"outcome": outcome, "sentence": sentence})


def _shows_again(found: RuleVerdict) -> bool:
    if found.outcome is Outcome.FAIL:
        return True
    if found.p_value is None:  # of min
        return found.value.value is not None and found.value.value < found.limit and found.outcome is not Outcome.PASS
    return found.value.value is not None and found.value.value > found.limit and found.p_value <= AGAIN


def _told(gate: Gate, verdict: Verdict, rules: list[RuleVerdict], sentence: str) -> Verdict:
    told = f"{verdict.confirmation} {sentence}" if verdict.confirmation else sentence
    return concluded(gate, rules, verdict.job_a, verdict.job_b, told)


def _only(gate: Gate, failed: Sequence[RuleVerdict]) -> Gate:
    """The gate with the rules that failed."""
    rules = [
        rule
        for rule in gate.rules
        if any(
            rule.metric == one.metric and rule.benchmark in (None, one.benchmark) and rule.policy in (None, one.policy)
            for one in failed
        )
    ]
    return gate.model_copy(update={"rules": rules})
