"""What the server knows: models, benchmarks and policies by name, and the workers that were heard of."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Response

from cluster.api.access import Reader
from cluster.api.jobs import Shared
from cluster.api.problems import described
from cluster.api.state import told
from cluster.known import (
    Known,
    KnownPolicy,
    ShownBenchmark,
    known_benchmarks,
    known_models,
    known_policies,
    shown_benchmark,
)
from cluster.status import Status
from db import listing
from db.errors import Missing
from db.listing import WorkerRow
from engine.registry import unknown

router = APIRouter(tags=["known"])


@router.get("/v1/models", response_model=list[Known], responses=described())
async def models(caller: Reader) -> Response:
    """The models known by name."""
    return await told(known_models)


@router.get("/v1/benchmarks", response_model=list[Known], responses=described())
async def benchmarks(caller: Reader) -> Response:
    """The benchmarks known by name."""
    return await told(known_benchmarks)


@router.get("/v1/benchmarks/{name}", response_model=ShownBenchmark, responses=described("missing"))
async def benchmark(
    caller: Reader, name: Annotated[str, Path(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=200)]
) -> Response:
    """One benchmark known by name, with three of its samples; one of the hub without them."""

    def shown() -> ShownBenchmark:
        known = [one.name for one in known_benchmarks()]
        if name not in known:
            raise Missing(unknown("benchmark", name, known))
        return shown_benchmark(name, fetch=False)

    return await told(shown)


@router.get("/v1/policies", response_model=list[KnownPolicy], responses=described())
async def policies(caller: Reader) -> Response:
    """The policies and their options."""
    return await told(known_policies)


@router.get("/v1/workers", response_model=list[WorkerRow], responses=described())
async def workers(caller: Reader, state: Shared) -> Response:
    """The workers that hold a task or asked for one lately."""
    return await told(lambda: listing.workers(state.db))


@router.get("/v1/status", response_model=Status, responses=described("missing"))
async def status(
    caller: Reader,
    state: Shared,
    job: Annotated[int | None, Query(ge=1, le=2**63 - 1, description="this job only, ended or not")] = None,
) -> Response:
    """Jobs that are open, workers, nodes, throughput, time left."""
    return await told(lambda: state.watcher.look(job))
