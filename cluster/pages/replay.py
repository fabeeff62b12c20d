"""A trace's page: thresholds as sliders."""

from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from cluster.api.access import Reader
from cluster.api.jobs import JobId, Shared
from cluster.grids import ReplaySpec, default_policies
from cluster.pages.showing import PageRoute, show
from cluster.replays import ReplayReport, replay_part, to_csv
from cluster.reports.replay_page import PAGE_TOKENS, view_of
from cluster.traced import Trace, traces_of
from db.errors import Missing
from db.session import Database

router = APIRouter(include_in_schema=False, route_class=PageRoute)

BenchmarkName = Annotated[str | None, Query(max_length=500)]


@router.get("/jobs/{job_id}/replay")
def show_replay(
    request: Request, job_id: JobId, caller: Reader, state: Shared, benchmark: BenchmarkName = None
) -> Response:
    """The page, over a part of the trace: what it costs does not grow with the job."""
    trace, others = _chosen(state.db, job_id, benchmark)
    query = f"?benchmark={quote(trace.run.benchmark, safe='')}"
    return show(
        request,
        caller,
        "replay.html.j2",
        charts={},
        kept=("replay.js",),
        sheets=("replay.css",),
        view=view_of(trace, _replayed(trace)),
        job_id=job_id,
        others=others,
        table_url=f"/jobs/{job_id}/replay.csv{query}",
    )


@router.get("/jobs/{job_id}/replay.csv")
def replay_csv(job_id: JobId, caller: Reader, state: Shared, benchmark: BenchmarkName = None) -> Response:
    """The policies of the page with every figure and its interval."""
    trace, _ = _chosen(state.db, job_id, benchmark)
    headers = {"Content-Disposition": f'attachment; filename="job-{job_id}-replay.csv"'}
    return Response(to_csv([_replayed(trace)]), headers=headers, media_type="text/csv")


def _replayed(trace: Trace) -> ReplayReport:
    return replay_part(trace, ReplaySpec(policies=default_policies(trace.pinned)), PAGE_TOKENS)


def _chosen(db: Database, job_id: int, benchmark: str | None) -> tuple[Trace, list[str]]:
    """The trace that is named, or the first, and the names of the others. Raises `Missing`."""
    found = traces_of(db, job_id)
    names = [trace.run.benchmark for trace in found]
    if benchmark is not None and benchmark not in names:
        raise Missing(f"job {job_id} has no trace of benchmark {benchmark!r}; it has {', '.join(map(repr, names))}.")
    place = 0 if benchmark is None else names.index(benchmark)
    return found[place], names[:place] + names[place + 1 :]
