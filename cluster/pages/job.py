"""One job: how far it is, what it found, what failed. Only sums and summaries are read, whatever its size."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Path, Request
from starlette.responses import JSONResponse, Response

from cluster.api.access import Caller, Reader
from cluster.api.jobs import JobId, Shared
from cluster.api.state import State
from cluster.pages.forms import Changes
from cluster.pages.jobs import read_yaml_text
from cluster.pages.showing import PageRoute, see_other, show
from cluster.reports.build import build_report
from cluster.reports.depth import Curve, curves, depth_figure
from cluster.reports.figures import Figure, exit_layers
from cluster.reports.model import BenchmarkReport, JobReport
from cluster.reports.notes import job_notes
from cluster.reports.page import charts, facts, provenance
from cluster.service import JobDetails
from db import jobs, listing
from db.figures import clock
from db.records import JobState
from db.session import Database

router = APIRouter(include_in_schema=False, route_class=PageRoute)

Verb = Literal["cancel", "pause", "resume", "retry"]


@dataclass(frozen=True)
class Actions:
    """What the caller may do with the job as it is."""

    verbs: tuple[Verb, ...]
    may_add_policy: bool


@router.get("/jobs/{job_id}")
def show_job(request: Request, job_id: JobId, caller: Reader, state: Shared) -> Response:
    """The page of a job."""
    return _page(request, job_id, caller, state)


def _page(
    request: Request, job_id: int, caller: Caller, state: State, *, complaint: str | None = None, policy: str = ""
) -> Response:
    details = state.service(caller.name).job(job_id)
    report = build_report(state.db, job_id, with_examples=False)
    layers = exit_layers(report)
    figures = charts(report, layers)
    if request.query_params.get("save") == "file":
        figures |= _depth_figures(state.db, report)
    return show(
        request,
        caller,
        "job.html.j2",
        status=422 if complaint else 200,
        charts=figures,
        layers=layers,
        scripts=("live.js", "job.js"),
        report=report,
        job=details.job,
        progress=details.progress,
        dead=details.dead,
        benchmarks={run.benchmark_id: run.benchmark for run in details.runs},
        time_left=time_left(details, clock(state.db)),
        workers=[worker for worker in listing.workers(state.db) if worker.job_id == job_id],
        actions=_actions(details, caller),
        job_notes=job_notes(report),
        facts=facts(report),
        provenance=provenance(report),
        complaint=complaint,
        policy_written=policy,
    )


def time_left(details: JobDetails, now: float) -> float | None:
    """Seconds, if it goes on as it went; None where nobody can tell. now: by the database's clock."""
    job, progress = details.job, details.progress
    is_going = job.state is JobState.RUNNING and not job.paused and job.started_at is not None
    if not is_going or not progress.batches_done or progress.batches_done >= progress.batches_total:
        return None
    spent = max(now - (job.started_at or 0.0), 0.0)
    return spent / progress.batches_done * (progress.batches_total - progress.batches_done)


def _actions(details: JobDetails, caller: Caller) -> Actions:
    """Those that have a sense now, of a caller who owns the job or looks after all."""
    from db.keys import Scope

    job = details.job
    if not caller.may(Scope.SUBMIT) or (job.principal != caller.name and not caller.may(Scope.ADMIN)):
        return Actions((), False)
    verbs: list[Verb] = []
    if job.paused:
        verbs.append("resume")
    elif not job.state.ended:
        verbs.append("pause")
    if details.dead and job.state is not JobState.CANCELLED:
        verbs.append("retry")
    if not job.state.ended:
        verbs.append("cancel")
    return Actions(tuple(verbs), job.state is JobState.DONE)


@router.post("/jobs/{job_id}/{verb}")
def change(
    request: Request, job_id: JobId, verb: Annotated[Verb | Literal["policies"], Path()], posted: Changes, state: Shared
) -> Response:
    """Cancel, pause, resume or retry a job, or give it one more policy."""
    caller = posted.caller
    caller.check_owns(jobs.job(state.db, job_id).principal, job_id)
    service = state.service(caller.name)
    if verb == "policies":
        written = posted.text("policy")
        try:
            service.add_policy(job_id, _policy(written))
        except ValueError as error:  # BadInput of engine and record
            return _page(request, job_id, caller, state, complaint=str(error), policy=written)
    else:
        {"cancel": service.cancel, "pause": service.pause, "resume": service.resume, "retry": service.retry}[verb](
            job_id
        )
    return see_other("/system" if posted.form.get("then") == "system" else f"/jobs/{job_id}")


def _policy(written: str) -> Any:
    """A name, or a mapping of a name to its options."""
    name = written.strip()
    return name if name and name.replace("-", "").isalnum() else read_yaml_text(written)


@router.get("/jobs/{job_id}/depth")
async def depth(job_id: JobId, caller: Reader, state: Shared) -> Response:
    """Depth over position: the charts, and the numbers that they are drawn from."""

    def read() -> Response:
        report = build_report(state.db, job_id, with_examples=False)
        found = [(benchmark, curves(state.db, benchmark)) for benchmark in report.benchmarks]
        numbers = {benchmark.name: [curve.model_dump() for curve in of_it] for benchmark, of_it in found}
        return JSONResponse({"benchmarks": numbers, "figures": _figures(found)})

    return await to_thread.run_sync(read, limiter=state.readers)


def _depth_figures(db: Database, report: JobReport) -> dict[str, Figure]:
    return _figures([(benchmark, curves(db, benchmark)) for benchmark in report.benchmarks])


def _figures(found: list[tuple[BenchmarkReport, list[Curve]]]) -> dict[str, Figure]:
    made = {}
    for number, (benchmark, of_it) in enumerate(found):
        n_layers = next((run.summary.n_layers for run in benchmark.runs), None)
        made[f"depth-{number}"] = depth_figure(of_it, n_layers)
    return {name: figure for name, figure in made.items() if figure}


@router.get("/jobs/{job_id}/report.csv")
def report_csv(job_id: JobId, caller: Reader, state: Shared) -> Response:
    """The report's table: a row a run, with every number."""
    table = build_report(state.db, job_id, with_examples=False).table()
    headers = {"Content-Disposition": f'attachment; filename="job-{job_id}-report.csv"'}
    return Response(table.to_csv(index=False, lineterminator="\n"), headers=headers, media_type="text/csv")
