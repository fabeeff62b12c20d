"""Labels over HTTP: what there is to judge of a job, and what a judge said."""

from itertools import chain
from typing import Annotated, Literal

from anyio import to_thread
from fastapi import APIRouter, Depends, Query
from pydantic import Field, ValidationError
from starlette.responses import Response, StreamingResponse

from cluster.api import examples
from cluster.api.access import Reader, Submitter
from cluster.api.jobs import JobId, JsonBody, Shared, own
from cluster.api.problems import described, streams
from cluster.api.state import told
from cluster.labels import LONGEST_NAME, Form, Judgement, LabelsImported, lines_of
from engine.errors import BadInput
from engine.spec import Spec, first_complaint

router = APIRouter(tags=["labels"])

MEDIA_TYPES = {"ndjson": "application/x-ndjson", "csv": "text/csv"}
_FORMS: dict[str, Form] = {"ndjson": "jsonl", "csv": "csv"}


class JudgedLabel(Spec):
    """What a judge said of one item."""

    id: str = Field(min_length=1, max_length=100, description="of the export")
    accepted: bool = Field(strict=True)
    line: int | None = Field(None, ge=1, le=2**31 - 1, description="of the judge's file, for messages")


class JudgedLabels(Spec):
    """What a judge said of items of one job."""

    judge: str = Field(min_length=1, max_length=LONGEST_NAME)
    labels: list[JudgedLabel] = Field(min_length=1)


async def _labels(body: JsonBody) -> JudgedLabels:
    try:
        return JudgedLabels.model_validate(body)
    except ValidationError as error:
        raise BadInput(f"labels: {first_complaint(error)}") from None


@router.get(
    "/v1/jobs/{job_id}/labels",
    response_class=StreamingResponse,
    responses=described("missing", "conflict") | streams(*MEDIA_TYPES.values()),
)
async def export(
    job_id: JobId,
    caller: Reader,
    state: Shared,
    form: Annotated[Literal["ndjson", "csv"], Query(alias="format")] = "ndjson",
    samples: Annotated[int | None, Query(ge=1, le=2**31 - 1, description="so many, drawn with the seed")] = None,
    seed: Annotated[int, Query(ge=-(2**63), le=2**63 - 1)] = 0,
) -> Response:
    """What there is to judge of a job that has ended: each text once; nothing tells which policies wrote it."""

    def begin() -> Response:
        found = state.service(caller.name).labels(job_id, samples=samples, seed=seed)
        first = next(found, None)  # what is wrong is told before the answer begins
        lines = lines_of(found if first is None else chain([first], found), _FORMS[form])
        headers = {"Content-Disposition": f'attachment; filename="labels-{job_id}.{_FORMS[form]}"'}
        return StreamingResponse((line.encode() for line in lines), media_type=MEDIA_TYPES[form], headers=headers)

    return await to_thread.run_sync(begin)


@router.post(
    "/v1/jobs/{job_id}/labels",
    response_model=LabelsImported,
    responses=described("missing", "conflict", "too-large", "wrong-media-type"),
    openapi_extra=examples.body("JudgedLabels", examples.LABELS),
)
async def import_labels(
    job_id: JobId, caller: Submitter, asked: Annotated[JudgedLabels, Depends(_labels)], state: Shared
) -> Response:
    """Take in what a judge said; the same again changes nothing, and another answer replaces the first."""
    judgements = [Judgement(one.id, one.accepted, one.line) for one in asked.labels]
    return await told(lambda: own(state, caller, job_id).import_labels(job_id, asked.judge, judgements))
