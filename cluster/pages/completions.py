"""The completions of a job: lists of those worth a look, and one sample under all policies, token by token."""

from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any
from urllib.parse import urlencode

from anyio import to_thread
from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from cluster.api.access import Caller, Reader
from cluster.api.jobs import JobId, Shared
from cluster.api.state import State
from cluster.pages.showing import PageRoute, show
from cluster.pages.texts import Piece, difference, texts_of
from cluster.reports.build import build_report, mark_of
from cluster.reports.examples import completion_of, token_ids_of
from cluster.reports.figures import exit_layers
from cluster.reports.model import BenchmarkReport, Example, ExampleCompletion, JobReport, RunReport
from cluster.reports.notes import TEXTS_WITHHELD
from db import jobs
from db.comparing import Kind, compared, sample_under_all
from db.errors import Missing
from db.records import RunRow

router = APIRouter(include_in_schema=False, route_class=PageRoute)

SampleId = Annotated[int, Path(ge=1, le=2**63 - 1)]
PAGE = 50

#: of a list, by the word in its address
FILTERS = {
    "": "All",
    Kind.DIFFER.value: "Policies differ",
    Kind.WRONGLY_STOPPED.value: "Wrongly stopped",
    Kind.ONLY_FULL.value: "Accepted only by full",
    Kind.ERRORS.value: "Errors",
}
MEANINGS = {
    "": "All samples in the benchmark's order.",
    Kind.DIFFER.value: "Samples for which a policy wrote another text than full depth.",
    Kind.WRONGLY_STOPPED.value: "Samples that a policy gave up although full depth got the first line right.",
    Kind.ONLY_FULL.value: "Samples whose first line full depth got right, and none of the policies.",
    Kind.ERRORS.value: "Samples that ended with an error under a policy.",
}


@dataclass(frozen=True)
class Beside:
    """A completion, and how it differs from full depth's and from the reference."""

    completion: ExampleCompletion
    from_full: list[Piece] | None  #: None: it is full depth's, or there is none
    from_reference: list[Piece] | None


@router.get("/jobs/{job_id}/completions")
def list_completions(
    request: Request,
    job_id: JobId,
    caller: Reader,
    state: Shared,
    benchmark: Annotated[int, Query(ge=0, le=10_000)] = 0,
    kind: Annotated[str, Query(max_length=30)] = "",
    run: Annotated[str, Query(max_length=20, pattern=r"^\d*$")] = "",
    start: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
) -> Response:
    """Samples of one benchmark that are of one kind, under one policy or under any."""
    if kind not in FILTERS:
        kind = ""
    job, runs = jobs.job(state.db, job_id), jobs.runs(state.db, job_id)
    by_benchmark = [list(group) for _, group in groupby(runs, key=lambda one: one.benchmark_id)]
    page, withheld = None, False
    mine: list[RunRow] = []
    if by_benchmark:
        if benchmark >= len(by_benchmark):
            raise Missing(f"job {job_id} has no benchmark {benchmark}; it has {len(by_benchmark)}.")
        mine = by_benchmark[benchmark]
        full = next((one for one in mine if one.policy_kind == "full"), None)
        others = [one for one in mine if one is not full and run in ("", str(one.id))]
        found = jobs.benchmark(state.db, mine[0].benchmark_id)
        withheld = found.content_hash in (job.pinned or {}).get("withheld", {})
        page = compared(
            state.db, full, others, found.n_samples, kind=Kind(kind) if kind else None, start=start, limit=PAGE
        )
    asked = [("benchmark", str(benchmark)), ("kind", kind), ("run", run)]

    def url(**changes: Any) -> str:
        chosen = dict(asked) | {name: str(value) for name, value in changes.items()}
        return f"/jobs/{job_id}/completions?{urlencode({name: value for name, value in chosen.items() if value})}"

    return show(
        request,
        caller,
        "completions.html.j2",
        job=job,
        names=[group[0].benchmark for group in by_benchmark],
        benchmark=benchmark,
        runs=mine,
        marks={one.id: mark_of(place) for place, one in enumerate(mine)},
        kind=kind,
        run=run,
        filters=FILTERS,
        meaning=MEANINGS[kind],
        withheld=withheld,
        texts_withheld=TEXTS_WITHHELD,
        page=page,
        start=start,
        url=url,
    )


@router.get("/jobs/{job_id}/completions/{sample_id}")
async def show_completion(
    request: Request, job_id: JobId, sample_id: SampleId, caller: Reader, state: Shared
) -> Response:
    """One sample under all policies."""

    def read() -> Response:
        return _completion_page(request, job_id, sample_id, caller, state)

    return await to_thread.run_sync(read, limiter=state.readers)  # it may have to load a tokenizer


def _completion_page(request: Request, job_id: int, sample_id: int, caller: Caller, state: State) -> Response:
    example, report, benchmark, neighbours, are_texts = _example(state.db, job_id, sample_id)
    full = next((c for c, run in zip(example.completions, benchmark.runs, strict=True) if run.kind == "full"), None)
    return show(
        request,
        caller,
        "completion.html.j2",
        layers=exit_layers(report),
        report=report,
        found=benchmark,
        sample_id=sample_id,
        example=example,
        sides=[_beside(c, full, example.reference) for c in example.completions],
        neighbours=neighbours,
        are_texts=are_texts,
        texts_withheld=TEXTS_WITHHELD,
    )


@router.get("/jobs/{job_id}/completions/{sample_id}/json")
def completion_json(job_id: JobId, sample_id: SampleId, caller: Reader, state: Shared) -> Response:
    """The same as numbers and texts."""
    example = _example(state.db, job_id, sample_id)[0]
    headers = {"Content-Disposition": f'attachment; filename="job-{job_id}-sample-{sample_id}.json"'}
    return Response(example.model_dump_json(), headers=headers, media_type="application/json")


def _example(db: Any, job_id: int, sample_id: int) -> tuple[Example, JobReport, BenchmarkReport, Any, bool]:
    under, neighbours = sample_under_all(db, job_id, sample_id)
    report = build_report(db, job_id, with_examples=False)
    benchmark = next(one for one in report.benchmarks if one.runs[0].run_id == under[0][0].id)
    decode, are_texts = texts_of(db, job_id) if benchmark.texts_kept else (None, True)
    rows = [row for _, row in under]
    sample = next((row.sample for row in rows if row is not None), None)
    if sample is None:
        raise Missing(f"sample {sample_id} of job {job_id} has not ended under any policy yet; come back later.")
    full = next((row for run, row in under if run.policy_kind == "full"), None)
    baseline = token_ids_of(full.outcome.tokens if full is not None else None)
    example = Example(
        sample=sample.name,
        source_group=sample.source_group,
        language=sample.language,
        why="",
        prompt=sample.prompt,
        prompt_cut=False,
        reference=sample.reference,
        completions=[
            _waiting(run) if row is None else completion_of(row, run, baseline, decode)
            for run, row in zip(benchmark.runs, rows, strict=True)
        ],
    )
    return example, report, benchmark, neighbours, are_texts


def _waiting(run: RunReport) -> ExampleCompletion:
    """Of a policy under which the sample has not ended."""
    return ExampleCompletion(
        mark=run.mark,
        policy=run.policy,
        text=None,
        error=None,
        finish=None,
        shown=False,
        n_tokens=0,
        tokens=[],
        first_divergence=None,
        scores={},
    )


def _beside(completion: ExampleCompletion, full: ExampleCompletion | None, reference: str) -> Beside:
    if completion.text is None:
        return Beside(completion, None, None)
    is_other = full is not None and full is not completion and full.text is not None
    return Beside(
        completion,
        difference(completion.text, full.text or "") if is_other and full is not None else None,
        difference(completion.text, reference),
    )
