"""What Prometheus reads: figures of the record, asked for at every scrape. docs/metrics.md says what each means.

No label names a job, a worker or a model: there are as many series on the last day as on the first.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from db import figures
from db.events import What
from db.figures import SHARD_SECONDS, JobFigures, ShardFigures
from db.session import Database
from engine.errors import BadInput
from workers.worker import GpuMemory

CONTENT_TYPE = CONTENT_TYPE_LATEST

#: counters of events: name, what they count, the event
_EVENTS = (
    ("jobs_submitted", "Jobs submitted.", What.SUBMITTED),
    ("jobs_done", "Jobs that ended with all their shards done.", What.DONE),
    ("jobs_failed", "Jobs that failed.", What.FAILED),
    ("jobs_cancelled", "Jobs that were cancelled.", What.CANCELLED),
    ("leases_lost", "Leases taken back from a worker that went silent or died.", What.REAPED),
    ("leases_refunded", "Lost leases whose attempt was given back: the work was not to blame.", What.REFUNDED),
    ("shards_suspect", "Shards that ended their worker twice, and go on sample by sample.", What.SUSPECT),
    ("shards_dead", "Shards whose last attempt failed.", What.SHARD_DEAD),
)


@dataclass
class _Seen:
    """What a job had come to at the last scrape."""

    job: JobFigures
    shards: ShardFigures


class Metrics(Collector):
    """Figures of one record. Counters begin at 0 with this object: what happened before it does not count."""

    def __init__(self, db: Database, gpus: Callable[[], Collection[tuple[str, GpuMemory]]] = lambda: ()) -> None:
        """gpus: the GPUs that workers have, each behind its node, for who knows them: the fleet, from pulses."""
        self.db = db
        self.gpus = gpus
        self._lock = Lock()  # scrapes may come at once
        self._seen: dict[int, _Seen] = {}  #: jobs that were open at the last scrape
        self._totals: dict[str, float] = {}
        self._newest = figures.newest_job(db)
        self._seen = {job.job_id: self._look(job) for job in figures.job_figures(db, after=self._newest)}

    def text(self) -> bytes:
        """The exposition, of content type `CONTENT_TYPE`. Raises `Unavailable`."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering shall not ask the database."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The families, read from the record now. Raises `Unavailable`."""
        queue = figures.queue_figures(self.db)
        with self._lock:
            self._count()
            totals = defaultdict(float, self._totals)
        yield _gauge("jobs", "Jobs that have not ended, by state.", ["state"], _labelled(queue.jobs))
        yield _gauge("tasks", "Tasks that are open, by kind and state.", ["kind", "state"], queue.tasks.items())
        oldest = _labelled(queue.oldest_ready_seconds)
        yield _gauge("oldest_ready_seconds", "How long the oldest task that is ready has waited.", ["kind"], oldest)
        yield _gauge("leases_expired", "Leases that ended and were not taken back yet.", [], [((), queue.expired)])
        workers = _labelled({"busy": queue.busy, "idle": queue.idle})
        yield _gauge("workers", "Workers that hold a task, and that asked for one in vain.", ["state"], workers)
        for name, says, what in _EVENTS:
            yield _counter(name, says, totals[what])
        yield _counter("attempts", "Claims of shards.", totals["claims"])
        yield _counter("samples", "Outcomes committed, errors included.", totals["samples"])
        yield _counter("errors", "Outcomes that are errors.", totals["errors"])
        yield _counter("tokens", "Tokens committed, of all policies.", totals["tokens"])
        yield _histogram(totals)
        if gpus := list(self.gpus()):
            used = [((node, one.gpu), one.used) for node, one in gpus]
            total = [((node, one.gpu), one.total) for node, one in gpus]
            yield _gauge("gpu_memory_used_bytes", "Memory of a GPU that is in use.", ["node", "gpu"], used)
            yield _gauge("gpu_memory_bytes", "Memory that a GPU has.", ["node", "gpu"], total)

    def _count(self) -> None:
        """Add what the jobs have come to since the last scrape; forget those that have ended."""
        seen, totals, newest = dict[int, _Seen](), defaultdict(float, self._totals), self._newest
        for job in figures.job_figures(self.db, after=self._newest, also=list(self._seen)):
            newest = max(newest, job.job_id)
            before, now = self._seen.get(job.job_id), self._look(job)
            # without a before: a new job, unless it was reopened or its number came late, which begin here
            if before is not None or job.job_id > self._newest:
                known = _amounts(before) if before else {}
                for name, amount in _amounts(now).items():  # what gets less was pruned: a counter never does
                    totals[name] += max(amount - known.get(name, 0), 0)
            if not job.ended:
                seen[job.job_id] = now
        # at once: a database that went away in between leaves everything as it was
        self._seen, self._totals, self._newest = seen, totals, newest

    def _look(self, job: JobFigures) -> _Seen:
        before = self._seen.get(job.job_id)
        if before is not None and before.job.shards_done == job.shards_done:
            return _Seen(job, before.shards)
        return _Seen(job, figures.shard_figures(self.db, job.job_id))


def _amounts(seen: _Seen) -> dict[str, float]:
    shards = seen.shards
    sums = {"samples": shards.samples, "errors": shards.errors, "tokens": shards.tokens, "seconds": shards.seconds}
    by_seconds = {f"shards {place}": count for place, count in enumerate(shards.by_seconds)}
    return {"claims": seen.job.claims} | sums | by_seconds | seen.job.events


def _histogram(totals: dict[str, float]) -> Metric:
    edges = [*map(str, SHARD_SECONDS), "+Inf"]
    buckets = [(edge, totals[f"shards {place}"]) for place, edge in enumerate(edges)]
    says = "Shards that are done, by the seconds of prefill and decoding under all policies."
    return HistogramMetricFamily("shortstop_shard_seconds", says, buckets=buckets, sum_value=totals["seconds"])


def _labelled(values: Mapping[str, float]) -> list[tuple[tuple[str], float]]:
    return [((label,), value) for label, value in values.items()]


def _gauge(name: str, says: str, labels: list[str], values: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    family = GaugeMetricFamily(f"shortstop_{name}", says, labels=labels)
    for label, value in values:
        family.add_metric(label, value)
    return family


def _counter(name: str, says: str, value: float) -> Metric:
    return CounterMetricFamily(f"shortstop_{name}", says, value=value)


@contextmanager
def served(metrics: Metrics, port: int, host: str = "127.0.0.1") -> Iterator[int]:
    """`/metrics` over HTTP while the block runs; gives the port, 0 being any that is free. Raises `BadInput`."""
    registry = CollectorRegistry()
    registry.register(metrics)
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise BadInput(
            f"--metrics-port {port}: {host}:{port} cannot be had ({error.strerror}); take another."
        ) from None
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
