"""The service of a server: what `cluster.local` does on a database, asked for over HTTP."""

import json
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import httpx
from pydantic import TypeAdapter

from cluster.asking import LONG, TRIES, Asking, Busy, pause
from cluster.comparing.model import Comparison
from cluster.known import Known, KnownPolicy, ShownBenchmark
from cluster.labels import Item, Judgement, LabelsImported
from cluster.received import Rows, parsed
from cluster.reports.model import JobReport
from cluster.service import JobDetails, Retried, Service
from cluster.spec import JobSpec, parse_job, read_job
from cluster.upload import uploaded
from db.errors import BadInput
from db.events import Event
from db.listing import JobSummary, WorkerRow
from db.records import JobRow, JobState, Progress

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from cluster.gates import Gate, Verdict
    from cluster.prepare import Validation
    from cluster.schedules.remote import RemoteSchedules
    from cluster.status import Status

#: jobs of a page of the list
_PAGE = 1000


class Client(Asking, Service):
    """A server, and an API key for it.

    Requests that change nothing, and submissions, are made again where the line breaks or the server is busy: a
    submission carries a key by which the server knows it. Raises what `Local` raises; `NotAllowed` for a key that may
    not, and `ServerError` for a server that is not there or fails.
    """

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # --- jobs --------------------------------------------------------------------------------------------------------

    def submit(
        self, spec: JobSpec | dict[str, Any] | str | Path, folder: Path | None = None, *, key: str | None = None
    ) -> int:
        """As `Service.submit`; spec: also what a spec file would hold, or such a file.

        Folders and files that the spec names and that lie on this machine are uploaded.
        """
        asked, folder = _read(spec, folder)
        body = uploaded(asked, folder, self.upload).dump()
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        return int(self._json("POST", "/v1/jobs", json=body, headers=headers, again=True)["job"])

    def validate(self, spec: JobSpec | dict[str, Any] | str | Path, folder: Path | None = None) -> "Validation":
        """As `Service.validate`; spec as in `submit`."""
        from cluster.prepare import Validation

        asked, folder = _read(spec, folder)
        body = uploaded(asked, folder, self.upload).dump()
        return self._typed(Validation, "POST", "/v1/validate", json=body, again=True, timeout=LONG)

    def done_before(self, spec: JobSpec | dict[str, Any] | str | Path, folder: Path | None = None) -> int | None:
        """As `Service.done_before`; spec as in `submit`."""
        asked, folder = _read(spec, folder)
        body = uploaded(asked, folder, self.upload).dump()
        answer = self._json("POST", "/v1/done-before", json=body, again=True, timeout=LONG)
        return None if answer["job"] is None else int(answer["job"])

    def upload(self, archive: bytes) -> str:
        """Upload a zip archive. Returns how specs name it: `upload:ID`, then `/` and a path in it."""
        headers = {"Content-Type": "application/zip"}
        answer = self._json("POST", "/v1/uploads", content=archive, headers=headers, again=True, timeout=LONG)
        return str(answer["upload"])

    def jobs(
        self, *, states: Sequence[str] = (), search: str | None = None, principal: str | None = None
    ) -> list[JobSummary]:
        """As `Service.jobs`; only those in one of these states, with this in the name or model, of this principal."""
        wanted = {"state": list(states), "search": search, "principal": principal, "limit": _PAGE}
        wanted = {name: value for name, value in wanted.items() if value}
        found: list[JobSummary] = []
        following: str | None = ""
        while following is not None:
            page = self._json("GET", "/v1/jobs", params=wanted | ({"cursor": following} if following else {}))
            found += TypeAdapter(list[JobSummary]).validate_python(page["jobs"])
            following = page["next"]
        return found

    def job(self, job_id: int) -> JobDetails:
        return self._typed(JobDetails, "GET", f"/v1/jobs/{job_id}")

    def cancel(self, job_id: int) -> JobRow:
        return self._typed(JobRow, "POST", f"/v1/jobs/{job_id}/cancel")

    def pause(self, job_id: int) -> JobRow:
        return self._typed(JobRow, "POST", f"/v1/jobs/{job_id}/pause")

    def retry(self, job_id: int) -> Retried:
        return self._typed(Retried, "POST", f"/v1/jobs/{job_id}/retry")

    def resume(self, job_id: int) -> Retried:
        return self._typed(Retried, "POST", f"/v1/jobs/{job_id}/resume", again=True)

    def add_policy(self, job_id: int, policy: Any) -> str:
        asked = policy.dump() if hasattr(policy, "dump") else policy
        return str(self._json("POST", f"/v1/jobs/{job_id}/policies", json=asked)["policy"])

    def status(self, job_id: int | None = None) -> "Status":
        """As `Service.status`."""
        from cluster.status import Status

        return self._typed(Status, "GET", "/v1/status", params={} if job_id is None else {"job": job_id})

    def events(self, job_id: int, *, follow: bool = False) -> Iterator[Event]:
        """As `Service.events`; `stream` begins behind an event that is known."""
        if follow:
            yield from self.stream(job_id)
        else:
            yield from self._typed(list[Event], "GET", f"/v1/jobs/{job_id}/events", params={"format": "json"})

    def report(self, job_id: int, *, with_tokens: bool = True) -> JobReport:
        """As `Service.report`."""
        params = {"tokens": with_tokens}
        return self._typed(JobReport, "GET", f"/v1/jobs/{job_id}/report", params=params, timeout=LONG)

    def compare(
        self,
        a: str,
        b: str | None = None,
        *,
        confidence: float = 0.95,
        metrics: Sequence[str] | None = None,
        levels: Sequence[str] = (),
        without: int | None = None,
    ) -> Comparison:
        """As `Service.compare`."""
        asked = {"a": a, "b": b, "confidence": confidence, "metric": metrics, "level": levels, "without": without}
        params = {name: value for name, value in asked.items() if value is not None}
        return self._typed(Comparison, "GET", "/v1/compare", params=params, timeout=LONG)

    def judge(self, gate: "Gate", a: str, b: str | None = None) -> "Verdict":
        """As `Service.judge`."""
        from cluster.gates import Verdict

        body = {"gate": gate.model_dump(mode="json"), "a": a, "b": b}
        return self._typed(Verdict, "POST", "/v1/gate", json=body, again=True, timeout=LONG)

    @property
    def schedules(self) -> "RemoteSchedules":
        """Jobs that recur."""
        from cluster.schedules.remote import RemoteSchedules

        return RemoteSchedules(self._typed, self._json, self.upload)

    # --- labels ------------------------------------------------------------------------------------------------------

    def labels(self, job_id: int, *, samples: int | None = None, seed: int = 0) -> Iterator[Item]:
        """As `Service.labels`."""
        params = {"seed": seed} | ({} if samples is None else {"samples": samples})
        with self._received("GET", f"/v1/jobs/{job_id}/labels", params=params) as file:
            for line in file:
                fields = json.loads(line)
                yield Item(*(fields[name] for name in Item.__dataclass_fields__))

    def import_labels(self, job_id: int, judge: str, judgements: Sequence[Judgement]) -> LabelsImported:
        """As `Service.import_labels`."""
        body = {"judge": judge, "labels": [asdict(one) for one in judgements]}
        return self._typed(LabelsImported, "POST", f"/v1/jobs/{job_id}/labels", json=body, again=True, timeout=LONG)

    # --- watching ----------------------------------------------------------------------------------------------------

    def work(
        self, job_id: int, *, inline: bool = False, on_progress: Callable[[Progress], None] = lambda progress: None
    ) -> JobState:
        """Wait: the work is the server's."""
        return self.wait(job_id, on_progress=on_progress)

    def wait(
        self,
        job_id: int,
        *,
        timeout_s: float | None = None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> JobState:
        """Until the job has ended. Returns the state that it ended in. Raises `TimeoutError`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        found = self.job(job_id)
        for kind, _ in self._frames(job_id, 0, deadline):
            if kind in ("job", "progress"):
                found = self.job(job_id)
                on_progress(found.progress)
            if found.job.state.ended:
                break
        state = self.job(job_id).job.state
        if not state.ended:
            raise TimeoutError(f"job {job_id} is still {state} after {timeout_s:g} s.")
        return state

    def stream(self, job_id: int, *, after: int = 0) -> Iterator[Event]:
        """What happens to the job behind the event `after`, as it happens, until the job has ended."""
        for kind, data in self._frames(job_id, after, None):
            if kind == "job":
                yield TypeAdapter(Event).validate_python(data)

    def _frames(self, job_id: int, after: int, deadline: float | None) -> Iterator[tuple[str, Any]]:
        """Server-sent events until the job has ended, the line broken or not; `("", None)` where nothing happens."""
        failures = 0
        while deadline is None or time.monotonic() < deadline:
            try:
                headers = {"Last-Event-ID": str(after)}
                with self._http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as answer:
                    if answer.status_code == 204:
                        return
                    self._check(answer)
                    for kind, data in parsed(answer.iter_lines()):
                        failures = 0
                        if kind == "job":
                            after = data["id"]
                        yield kind, data
                        if deadline is not None and time.monotonic() >= deadline:
                            return
            except (httpx.TransportError, Busy) as error:
                failures += 1
                if failures >= TRIES:
                    raise self._gone(error) from None
                pause(failures)

    # --- rows --------------------------------------------------------------------------------------------------------

    @overload
    def completions(self, job_id: int, *, arrow: Literal[False] = False) -> "pd.DataFrame": ...

    @overload
    def completions(self, job_id: int, *, arrow: Literal[True]) -> "pa.RecordBatchReader": ...

    def completions(self, job_id: int, *, arrow: bool = False) -> "pd.DataFrame | pa.RecordBatchReader":
        """A row a completion, with a column a metric. arrow: streamed; memory does not grow with the job."""
        reader = self._table(f"/v1/jobs/{job_id}/completions")
        return reader if arrow else reader.read_pandas()

    def tokens(self, job_id: int) -> "pa.RecordBatchReader":
        """A row a token, streamed as Arrow: the columns of the view `token`. `.read_pandas()` gives a DataFrame."""
        return self._table(f"/v1/jobs/{job_id}/tokens")

    def _table(self, path: str) -> "pa.RecordBatchReader":
        """Parquet of any size, through a file that is gone when it is read."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = self._received("GET", path, params={"format": "parquet"})
        table = pq.ParquetFile(file)

        def batches() -> "Iterator[pa.RecordBatch]":
            with file:
                yield from table.iter_batches()

        return pa.RecordBatchReader.from_batches(table.schema_arrow, batches())

    def query(self, sql: str, *, timeout_s: float = 30, limit: int | None = None) -> "Rows":
        """As `Service.query`; all rows are here before the first is given."""
        body = {"sql": sql, "timeout_s": timeout_s, "limit": limit, "format": "arrays"}
        return Rows(self._received("POST", "/v1/query", json=body))

    # --- what is known -----------------------------------------------------------------------------------------------

    def models(self) -> list[Known]:
        return self._typed(list[Known], "GET", "/v1/models")

    def benchmarks(self) -> list[Known]:
        return self._typed(list[Known], "GET", "/v1/benchmarks")

    def benchmark(self, name: str) -> ShownBenchmark:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name.endswith((".yaml", ".yml")):
            raise BadInput(
                f"benchmark {name!r}: a server shows those that it knows by name; ask for this one without it."
            )
        return self._typed(ShownBenchmark, "GET", f"/v1/benchmarks/{name}")

    def policies(self) -> list[KnownPolicy]:
        return self._typed(list[KnownPolicy], "GET", "/v1/policies")

    def workers(self) -> list[WorkerRow]:
        """The workers that hold a task or asked for one lately."""
        return self._typed(list[WorkerRow], "GET", "/v1/workers")


def _read(spec: JobSpec | dict[str, Any] | str | Path, folder: Path | None) -> tuple[JobSpec, Path]:
    """The spec, and what its relative paths start from."""
    if isinstance(spec, str | Path):
        return read_job(spec), folder or Path(spec).absolute().parent
    return parse_job(spec), folder or Path.cwd()
