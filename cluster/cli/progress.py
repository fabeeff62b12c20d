"""How far long work is: a bar on a terminal, plain lines elsewhere; both on standard error."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from cluster.cli.output import note

if TYPE_CHECKING:
    from rich.progress import TaskID

    import db.records

#: seconds between two plain lines of one stage: a log stays short, a watcher knows that it lives
LINE_SECONDS = 10


class Watch(Protocol):
    """Something that shows how far the work is."""

    def show(self, stage: str, done: int, total: int, unit: str, remark: str = "") -> None: ...

    def __enter__(self) -> "Watch": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def watch() -> Watch:
    """A bar where standard error is a terminal, lines elsewhere."""
    return Bar() if sys.stderr.isatty() else Lines()


def show_job(watch: Watch, progress: "db.records.Progress") -> None:
    """Show a job's progress."""
    if not progress.batches_total:
        watch.show("preparing", 0, 0, "batches")
        return
    remark = f"{progress.errors} errors" if progress.errors else ""
    watch.show("evaluating", progress.batches_done, progress.batches_total, "batches", remark)


class Bar:
    """One bar a stage, on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[remark]}"),
            console=Console(stderr=True),
        )
        self._stages: dict[str, TaskID] = {}

    def show(self, stage: str, done: int, total: int, unit: str, remark: str = "") -> None:
        if stage not in self._stages:
            for earlier in self._stages.values():
                self._progress.update(earlier, visible=False)
            self._stages[stage] = self._progress.add_task(stage, unit=unit, remark=remark)
        self._progress.update(self._stages[stage], completed=done, total=total or None, remark=remark)

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class Lines:
    """A line when a stage begins and ends, and every few seconds while it moves."""

    def __init__(self) -> None:
        self._last = ("", -1)
        self._at = 0.0

    def show(self, stage: str, done: int, total: int, unit: str, remark: str = "") -> None:
        before, count = self._last
        due = stage != before or (done != count and (done == total or time.monotonic() >= self._at + LINE_SECONDS))
        if due:
            self._last, self._at = (stage, done), time.monotonic()
            amount = f": {done} of {total} {unit}" if total else ""
            note(f"{stage}{amount}{', ' if remark else ''}{remark}")

    def __enter__(self) -> "Lines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None
