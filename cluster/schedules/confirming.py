"""A gate that failed is asked again before anybody is told: `cluster.comparing.confirming` says how, jobs do it.

A firing whose runs have different baselines is asked again part by part, a part being what one baseline job is held to.
"""

from collections.abc import Iterable, Sequence

from cluster.comparing.confirming import again, settle
from cluster.gates import Gate, Verdict, concluded
from cluster.schedules.lines import Held, RunFigures
from cluster.service import Service
from cluster.spec import JobSpec
from db.records import JobState
from db.schedules import Wish

_NONE_FRESH = "Not confirmed: the benchmark has no samples beside those it drew."


def parts_of(gate: Gate, verdict: Verdict, held: Iterable[Held], of_run: dict[int, RunFigures]) -> list[Verdict]:
    """The verdict by baseline job."""
    names: dict[int, set[tuple[str, str]]] = {}
    for each in held:
        if each.job_id is not None:
            run = of_run[each.run_id]
            names.setdefault(each.job_id, set()).add((run.benchmark, run.policy))
    found = []
    for job_id, runs in names.items():
        rules = [rule for rule in verdict.rules if (rule.benchmark, rule.policy) in runs]
        if rules:
            found.append(concluded(gate, rules, job_id, verdict.job_b))
    return found


def wishes(service: Service, parts: Sequence[Verdict]) -> dict[str, Wish]:
    """The jobs that ask again for what failed, by the role that they have for the firing; none where nothing can."""
    return {
        role: Wish(spec.name, spec.dump(), spec.priority)
        for number, part in enumerate(parts, start=1)
        for asked in again(service, part)
        for role, spec in _roles(number, asked.kind, asked.before, asked.after)
    }


def settled(service: Service, gate: Gate, parts: Sequence[Verdict], jobs: dict[str, int]) -> list[Verdict]:
    """The parts after the jobs of `wishes` have ended; jobs: their numbers by role, others among them."""
    return [_settled(service, gate, number, part, jobs) for number, part in enumerate(parts, start=1)]


def _settled(service: Service, gate: Gate, number: int, part: Verdict, jobs: dict[str, int]) -> Verdict:
    if not part.failed:
        return part
    asked_again, found = again(service, part), part
    for asked in asked_again:
        ids = [jobs[role] for role, _ in _roles(number, asked.kind, asked.before, asked.after)]
        undone = [job.job for job in map(service.job, ids) if job.job.state is not JobState.DONE]
        if undone:
            found = _told(gate, found, f"Not confirmed: job {undone[0].id} is {undone[0].state}.")
        else:
            found = settle(service, gate, found, asked, ids[0] if len(ids) == 2 else None, ids[-1])
    is_asked = any(asked.kind == "quality" for asked in asked_again)
    if not is_asked and any(one.kind == "quality" for one in found.failed):
        found = _told(gate, found, _NONE_FRESH)
    return found


def _roles(number: int, kind: str, before: JobSpec | None, after: JobSpec) -> list[tuple[str, JobSpec]]:
    """The job that stands in for the baseline first, where there is one."""
    word = {"quality": "fresh samples", "speed": "rerun"}[kind] + ("" if number == 1 else f" {number}")
    return [*([] if before is None else [(f"baseline on {word}", before)]), (word, after)]


def together(gate: Gate, parts: Sequence[Verdict], note: str) -> Verdict:
    """One verdict again. note: what is said behind its sentence."""
    rules = [rule for part in parts for rule in part.rules]
    told = " ".join(part.confirmation for part in parts if part.confirmation)
    found = concluded(gate, rules, parts[0].job_a, parts[0].job_b, told or None) if rules else parts[0]
    sentence = " ".join(piece for piece in (found.sentence, told, note) if piece)
    return found.model_copy(update={"sentence": sentence})


def _told(gate: Gate, verdict: Verdict, sentence: str) -> Verdict:
    told = f"{verdict.confirmation} {sentence}" if verdict.confirmation else sentence
    return concluded(gate, verdict.rules, verdict.job_a, verdict.job_b, told)
