"""Events as they happen (server-sent events): one look at the record for all who listen."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from time import monotonic

import structlog
from anyio import to_thread

from cluster.api.problems import Problem
from db import events, jobs
from db.errors import RecordError
from db.records import JobState
from db.session import Database

log = structlog.get_logger()

#: between two looks for events, and between two for progress
LOOK_SECONDS = 0.2
PROGRESS_SECONDS = 1.0
#: after which a silent stream says that it lives, and looks whether its caller may still listen
BEAT_SECONDS = 5.0
MOST_LISTENERS = 1_000
#: events that are read at once
_PIECE = 500


class Watch:
    """One job, for all who listen to it."""

    def __init__(self, db: Database, job_id: int) -> None:
        self._db, self._job_id = db, job_id
        self._mark: tuple[JobState, int] | None = None
        self._pieces: dict[int, asyncio.Task[list[tuple[int, bytes]]]] = {}
        self.listeners = 0
        self.progress: bytes | None = None
        self.changed = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether the job has ended: its last event is among those that `piece` gives from now on."""
        return self._mark is not None and self._mark[0].ended

    def note(self, mark: tuple[JobState, int]) -> None:
        if mark != self._mark:
            self._mark = mark
            self._pieces.clear()
            self.wake()

    def note_progress(self, done: int, total: int) -> None:
        frame = _frame("progress", {"batches_done": done, "batches_total": total})
        if frame != self.progress:
            self.progress = frame
            self.wake()

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    async def piece(self, after: int) -> list[tuple[int, bytes]]:
        """The events behind `after`, each with its number: read once, however many ask."""
        if after not in self._pieces:
            self._pieces[after] = asyncio.ensure_future(to_thread.run_sync(self._read, after))
        reading = self._pieces[after]
        try:
            return await asyncio.shield(reading)
        except RecordError as error:
            log.warning("events cannot be read", reason=str(error))
            self._pieces.pop(after, None)  # the next look reads them
            return []

    def _read(self, after: int) -> list[tuple[int, bytes]]:
        found = events.events(self._db, self._job_id, after, _PIECE)
        return [(event.id, _frame("job", asdict(event), event.id)) for event in found]


class Hub:
    """All jobs that somebody listens to."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._watches: dict[int, Watch] = {}
        self._closing = False

    async def run(self) -> None:
        """Look at the record for as long as the server runs."""
        progress_at = 0.0
        while not self._closing:
            try:
                await self._look()
                if monotonic() >= progress_at:
                    progress_at = monotonic() + PROGRESS_SECONDS
                    await self._look_at_progress()
            except RecordError as error:
                log.warning("events cannot be read", reason=str(error))
            await asyncio.sleep(LOOK_SECONDS)

    async def _look(self) -> None:
        if self._watches:
            found = await to_thread.run_sync(events.marks, self._db, list(self._watches))
            for job_id, mark in found.items():
                if job_id in self._watches:
                    self._watches[job_id].note(mark)

    async def _look_at_progress(self) -> None:
        for job_id, watch in list(self._watches.items()):
            if not watch.ended or watch.progress is None:
                watch.note_progress(*await to_thread.run_sync(jobs.batches, self._db, job_id))

    def close(self) -> None:
        """End all streams; those who listen come again."""
        self._closing = True
        for watch in self._watches.values():
            watch.wake()

    @property
    def closing(self) -> bool:
        """Whether the server ends, and all streams with it."""
        return self._closing

    def check_room(self) -> None:
        """Raises `Problem` where nobody else can listen."""
        if sum(watch.listeners for watch in self._watches.values()) >= MOST_LISTENERS:
            raise Problem("unavailable", f"{MOST_LISTENERS} streams are open; try again later.")

    async def stream(self, job_id: int, after: int, still_valid: Callable[[], Awaitable[bool]]) -> AsyncIterator[bytes]:
        """What happens to the job behind the event `after`, until it has ended; a beat where nothing does."""
        told, beat_at = None, monotonic() + BEAT_SECONDS
        with self._watching(job_id) as watch:
            yield b"retry: 1000\n\n"
            while not self._closing:
                changed, ended = watch.changed, watch.ended
                piece = await watch.piece(after)
                for id, frame in piece:
                    yield frame
                    after = id
                if watch.progress != told:
                    told = watch.progress
                    yield told or b""
                if len(piece) == _PIECE:
                    continue
                if ended:
                    return
                try:
                    await asyncio.wait_for(changed.wait(), max(beat_at - monotonic(), 0))
                except TimeoutError:
                    beat_at = monotonic() + BEAT_SECONDS
                    if not await still_valid():
                        return
                    yield b": \n\n"

    @contextmanager
    def _watching(self, job_id: int) -> Iterator[Watch]:
        watch = self._watches.setdefault(job_id, Watch(self._db, job_id))
        watch.listeners += 1
        try:
            yield watch
        finally:
            watch.listeners -= 1
            if not watch.listeners:
                self._watches.pop(job_id, None)


def _frame(event: str, data: object, id: int | None = None) -> bytes:
    named = "" if id is None else f"id: {id}\n"
    return f"{named}event: {event}\ndata: {json.dumps(data)}\n\n".encode()
