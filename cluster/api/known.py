"""What the server knows: models, benchmarks and policies by name, and the workers that were heard of."""

from fastapi import APIRouter

from cluster.api.access import Reader
from cluster.api.jobs import Shared
from cluster.api.problems import described
from cluster.known import Known, KnownPolicy, known_benchmarks, known_models, known_policies
from db import listing
from db.listing import WorkerRow

router = APIRouter(tags=["known"])


@router.get("/v1/models", responses=described())
def models(caller: Reader) -> list[Known]:
    """The models known by name."""
    return known_models()


@router.get("/v1/benchmarks", responses=described())
def benchmarks(caller: Reader) -> list[Known]:
    """The benchmarks known by name."""
    return known_benchmarks()


@router.get("/v1/policies", responses=described())
def policies(caller: Reader) -> list[KnownPolicy]:
    """The policies and their options."""
    return known_policies()


@router.get("/v1/workers", responses=described())
def workers(caller: Reader, state: Shared) -> list[WorkerRow]:
    """The workers that hold a task or asked for one lately."""
    return listing.workers(state.db)
