"""Comparisons and gates over HTTP."""

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query
from pydantic import Field, ValidationError
from starlette.responses import Response

from cluster.api import examples
from cluster.api.access import Reader
from cluster.api.jobs import JsonBody, Shared
from cluster.api.problems import described
from cluster.comparing.model import Comparison
from cluster.gates import Gate, Verdict, parse_gate
from engine.errors import BadInput
from engine.spec import Spec, first_complaint

router = APIRouter(tags=["comparisons"])

_SIDE = r"^[^\x00-\x1f\x7f]*$"
Side = Annotated[
    str, Query(max_length=300, pattern=_SIDE, description="a job like 12, a policy like 12:full, a run like run:34")
]
OtherSide = Annotated[
    str | None,
    Query(max_length=300, pattern=_SIDE, description="held against it; without it the policies of A against its full"),
]
Names = Annotated[list[str] | None, Query(max_length=50)]


class Judged(Spec):
    """What is to be judged by which gate."""

    gate: Gate
    a: str = Field(max_length=300)
    b: str | None = Field(None, max_length=300)


@router.get("/v1/compare", response_model=Comparison, responses=described("missing"))
async def compare(
    caller: Reader,
    state: Shared,
    a: Side,
    b: OtherSide = None,
    confidence: Annotated[float, Query(ge=0.5, le=0.9999, description="of the intervals, two-sided")] = 0.95,
    metric: Names = None,
    level: Names = None,
    without: Annotated[int | None, Query(ge=1, le=2**63 - 1, description="leave out this job's samples")] = None,
) -> Response:
    """What changed from A to B, how sure that is, and on which samples."""

    def build() -> Response:
        found = state.service(caller.name).compare(
            a, b, confidence=confidence, metrics=metric, levels=level or (), without=without
        )
        return Response(found.model_dump_json(), media_type="application/json")

    return await to_thread.run_sync(build, limiter=state.readers)


@router.post(
    "/v1/gate",
    response_model=Verdict,
    responses=described("missing", "too-large", "wrong-media-type"),
    openapi_extra=examples.body("Judged", examples.GATE),
)
async def judge(caller: Reader, body: JsonBody, state: Shared) -> Response:
    """What a gate says of B against A; nothing is run for it."""

    def decide() -> Response:
        asked = _judged(body)
        verdict = state.service(caller.name).judge(asked.gate, asked.a, asked.b)
        return Response(verdict.model_dump_json(), media_type="application/json")

    return await to_thread.run_sync(decide, limiter=state.readers)


def _judged(body: Any) -> Judged:
    gate = body.get("gate") if isinstance(body, dict) else None
    if gate is not None:
        body = body | {"gate": parse_gate(gate)}
    try:
        return Judged.model_validate(body)
    except ValidationError as error:
        raise BadInput(f"gate: {first_complaint(error)}") from None
