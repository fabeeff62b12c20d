"""Structured logs: one event a line, to standard error; coloured on a terminal, JSON elsewhere.

While a worker is at a shard its lines carry job, shard, epoch, worker and node (`workers.context`).
"""

import logging
import sys
from typing import TextIO

import structlog
from structlog.typing import Processor

_NUMBERS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to what standard error is when a line comes, not to what it was."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        """Fixed: the base class sets one when it is made."""


def configure_logs(level: str = "warning") -> None:
    """Set up structlog for this process. level: debug, info, warning or error.

    What libraries log in the standard way comes out in the same form, from warnings on.
    """
    shape: list[Processor]
    if sys.stderr.isatty():
        shape = [structlog.dev.ConsoleRenderer()]
    else:
        shape = [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    facts: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    structlog.configure(
        processors=[*facts, *shape],
        wrapper_class=structlog.make_filtering_bound_logger(_NUMBERS[level]),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )
    _configure_libraries(max(_NUMBERS[level], logging.WARNING), facts, shape)


def _configure_libraries(level: int, facts: list[Processor], shape: list[Processor]) -> None:
    handler, root = _StandardError(), logging.getLogger()
    handler.setLevel(level)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*facts, structlog.stdlib.add_logger_name, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *shape],
        )
    )
    for before in [one for one in root.handlers if isinstance(one, _StandardError)]:
        root.removeHandler(before)
    root.addHandler(handler)
