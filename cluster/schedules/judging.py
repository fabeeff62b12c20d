"""What a firing came to, once its jobs have ended: figures for the history, and a verdict against its baseline.

A gate that fails is asked again before anybody is told: the jobs that do so are submitted beside the firing, which
stays open until they have ended, too.
"""

from collections.abc import Sequence
from typing import Any

import structlog

from cluster.comparing.build import compare
from cluster.comparing.model import Comparison
from cluster.comparing.sides import Asked
from cluster.gates import Gate, Outcome, Rule, decide, judge
from cluster.gates import Verdict as Judged
from cluster.local import Local
from cluster.schedules import confirming
from cluster.schedules.lines import Held, RunFigures, as_figures, changed, held_against, provenance, run_figures
from cluster.schedules.spec import ScheduleSpec, parse_schedule
from cluster.settings import load_settings
from db import firings, jobs
from db.errors import Missing, RecordError
from db.records import JobRow, JobState
from db.schedules import RUN, Clock, FiringRow, ScheduleRow, Verdict
from db.session import Database
from engine.errors import BadInput

log = structlog.get_logger()


def judge_ended(db: Database, clock: Clock) -> int:
    """Judge the firings whose jobs have ended. Returns how many. Raises `RecordError` where the database is away."""
    done = 0
    for row, one in firings.ended(db):
        try:
            done += _judge(db, row, one, clock)
        except ValueError as error:  # BadInput of engine and record
            done += _settle_without(db, row, one, str(error), clock)
        except RecordError:
            raise
        except Exception as error:
            log.error("a firing cannot be judged", schedule=row.name, fire_at=one.fire_at, exc_info=True)
            done += _settle_without(db, row, one, f"it could not be judged: {type(error).__name__}: {error}", clock)
    return done


def _judge(db: Database, row: ScheduleRow, one: FiringRow, clock: Clock) -> bool:
    job_id = one.jobs[RUN]
    try:
        job = jobs.job(db, job_id)
    except Missing:
        return _settle_without(db, row, one, f"job {job_id} is gone: it was pruned before anybody looked.", clock)
    if job.state is not JobState.DONE:
        verdict, sentence = _of_state(job)
        return firings.settle(db, row, one, verdict, sentence, at=clock())
    spec = parse_schedule(row.spec)
    runs = run_figures(db, spec, job_id)
    if spec.gate is None:
        sentence = f"job {job_id} is done; the schedule has no gate."
        return _settle(db, row, one, runs, clock, Verdict.PASS, sentence)
    if len(one.jobs) > 1:
        parts, note = _asked_again(db, spec.gate, one)
    else:
        parts, note = _first(db, row, spec, one, runs)
        wishes = confirming.wishes(_service(db), parts) if any(part.failed for part in parts) else {}
        if wishes:
            log.info("schedule asks again", schedule=row.name, fire_at=one.fire_at, jobs=list(wishes))
            return firings.confirm(db, row, one, wishes, _kept(parts, note))
        parts = confirming.settled(_service(db), spec.gate, parts, one.jobs)
    found = confirming.together(spec.gate, parts, note)
    return _settle(db, row, one, runs, clock, Verdict(found.outcome.value), found.sentence, _kept(parts, note))


def _service(db: Database) -> Local:
    return Local(load_settings(), db)


def _settle(
    db: Database,
    row: ScheduleRow,
    one: FiringRow,
    runs: Sequence[RunFigures],
    clock: Clock,
    verdict: Verdict,
    sentence: str,
    judged: dict[str, Any] | None = None,
) -> bool:
    facts = provenance(db, one.jobs[RUN])
    log.info("schedule judged", schedule=row.name, fire_at=one.fire_at, verdict=verdict.value, sentence=sentence)
    return firings.settle(
        db,
        row,
        one,
        verdict,
        sentence,
        at=clock(),
        judged=judged,
        figures=as_figures(runs),
        provenance=facts,
        changed=changed(_facts_before(db, row, one) or facts, facts),
    )


def _settle_without(db: Database, row: ScheduleRow, one: FiringRow, sentence: str, clock: Clock) -> bool:
    """There is nothing to judge; what the job came to stays out of the history, so that it is nobody's baseline."""
    return firings.settle(db, row, one, Verdict.INCONCLUSIVE, sentence, at=clock(), judged=one.judged)


def _of_state(job: JobRow) -> tuple[Verdict, str]:
    """Of a job that has not done what it was asked for."""
    if job.state is JobState.FAILED:
        return Verdict.FAIL, f"job {job.id} failed: {job.error or 'its tasks died'}"
    return Verdict.INCONCLUSIVE, f"job {job.id} was {job.state} before its end."


def _facts_before(db: Database, row: ScheduleRow, one: FiringRow) -> dict[str, Any] | None:
    """Of the last firing that left any."""
    before = firings.firings(db, row.id, before=one.fire_at, limit=20, judged=True)
    return next((other.provenance for other in before if other.provenance), None)


def _kept(parts: Sequence[Judged], note: str) -> dict[str, Any]:
    """As the record keeps a verdict, while it is asked again and afterwards."""
    return {"parts": [part.model_dump(mode="json") for part in parts], "note": note}


def _asked_again(db: Database, gate: Gate, one: FiringRow) -> tuple[list[Judged], str]:
    """The verdict that was kept, after the jobs that confirm it have ended."""
    assert one.judged is not None
    parts = [Judged.model_validate(part) for part in one.judged["parts"]]
    return confirming.settled(_service(db), gate, parts, one.jobs), str(one.judged["note"])


# --- against the baseline ------------------------------------------------------------------------------------


def _first(
    db: Database, row: ScheduleRow, spec: ScheduleSpec, one: FiringRow, runs: list[RunFigures]
) -> tuple[list[Judged], str]:
    """What the gate says of the firing's own job, by baseline job; and of which runs it can say nothing."""
    assert spec.gate is not None
    held = held_against(db, row, spec, one, runs)
    of_run = {run.run_id: run for run in runs}
    known = [each for each in held if each.baseline is not None]
    begun = [
        f"{of_run[each.run_id].policy} on {of_run[each.run_id].benchmark} ({each.reason})"
        for each in held
        if each.baseline is None
    ]
    note = f"Without a baseline: {'; '.join(begun)}." if begun else ""
    if not known:
        return [_alone(db, spec.gate, one.jobs[RUN])], note
    verdict = _against(db, spec.gate, known, of_run)
    return confirming.parts_of(spec.gate, verdict, known, of_run), note


def _against(db: Database, gate: Gate, held: list[Held], of_run: dict[int, RunFigures]) -> Judged:
    """Each run against the one that its line gives, all of them together, as the gate's rules are one family."""
    parts = [_compared(db, gate, each) for each in held]
    together = parts[0].model_copy(update={"pairs": [pair for part in parts for pair in part.pairs]})
    names = {(of_run[each.run_id].benchmark, of_run[each.run_id].policy) for each in held}
    rules = [rule for rule in gate.rules if _applies(rule, names)]
    if not rules:
        raise BadInput("none of the gate's rules is about a run that has a baseline.")
    return decide(gate.model_copy(update={"rules": rules}), together)


def _applies(rule: Rule, names: set[tuple[str, str]]) -> bool:
    return any(rule.benchmark in (None, benchmark) and rule.policy in (None, policy) for benchmark, policy in names)


def _compared(db: Database, gate: Gate, each: Held) -> Comparison:
    baseline, mine = Asked(None, run_id=each.baseline), Asked(None, run_id=each.run_id)
    levels = {rule.metric for rule in gate.rules if rule.min is not None}
    return compare(db, baseline, mine, confidence=gate.two_sided, levels=levels)


def _alone(db: Database, gate: Gate, job_id: int) -> Judged:
    """The rules that ask how good a policy is, whatever was before it; where there are none it is inconclusive."""
    rules = [rule for rule in gate.rules if rule.min is not None]
    if rules and any(run.policy_kind != "full" for run in jobs.runs(db, job_id)):
        found = judge(db, gate.model_copy(update={"rules": rules}), Asked(job_id))
        if found.outcome is not Outcome.PASS or len(rules) == len(gate.rules):
            return found
    sentence = "There is nothing to hold it against."
    return Judged(outcome=Outcome.INCONCLUSIVE, sentence=sentence, rules=[], job_a=job_id, job_b=job_id)
