"""How far two runs of the same spec differ in speed: pairs of runs, kept when the runs themselves are gone."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import or_, select

from db.clock import now
from db.records import JobState, RunRow
from db.session import Database
from db.tables import benchmark, insert_new, job, noise_pair, run


@dataclass(frozen=True)
class NoisePair:
    """Two runs of the same spec on one device class."""

    run_a: int
    run_b: int
    device_class: str
    content_hash: str  #: of the benchmark
    policy: str  #: its label
    log_token: float  #: logarithm of A's time for a token over B's, by the clock
    log_request: float  #: the same of prefill and decoding together
    paced_token: float | None = None  #: the same where each time is a multiple of full depth's in its own job
    paced_request: float | None = None


def keep_pairs(db: Database, pairs: Iterable[NoisePair]) -> None:
    """Note what pairs came to; of a pair that is there already nothing changes."""
    with db.write() as connection:
        for pair in pairs:
            insert_new(connection, noise_pair, asdict(pair) | {"measured_at": now()})


def pairs_of(db: Database, content_hash: str, policy: str) -> list[NoisePair]:
    """All that is known of a benchmark and a policy, by device class and run."""
    columns = [noise_pair.c[name] for name in NoisePair.__dataclass_fields__]
    chosen = select(*columns).where(noise_pair.c.content_hash == content_hash, noise_pair.c.policy == policy)
    with db.read() as connection:
        rows = connection.execute(chosen.order_by(noise_pair.c.device_class, noise_pair.c.run_a)).all()
    return [NoisePair(*row) for row in rows]


def unpaired_runs(db: Database, content_hash: str, policy: str, *, newest: int) -> list[tuple[RunRow, dict[str, Any]]]:
    """The newest runs of finished jobs on this benchmark under this policy that are in no pair, with what they pin."""
    columns = [run.c[name] for name in RunRow.__dataclass_fields__]
    is_paired = select(noise_pair.c.run_a).where(or_(noise_pair.c.run_a == run.c.id, noise_pair.c.run_b == run.c.id))
    chosen = (
        select(*columns, job.c.pinned)
        .join(job, job.c.id == run.c.job_id)
        .join(benchmark, benchmark.c.id == run.c.benchmark_id)
        .where(
            benchmark.c.content_hash == content_hash,
            run.c.policy == policy,
            job.c.state == JobState.DONE,
            ~is_paired.exists(),
        )
        .order_by(run.c.id.desc())
        .limit(newest)
    )
    with db.read() as connection:
        rows = connection.execute(chosen).all()
    return [(RunRow(*row[:-1]), row[-1]) for row in reversed(rows)]
