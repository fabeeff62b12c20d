"""Structured logs: one event a line, to standard error; coloured on a terminal, JSON elsewhere."""

import logging
import sys

import structlog

_NUMBERS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure_logs(level: str = "warning") -> None:
    """Set up structlog for this process. level: debug, info, warning or error."""
    shape: list[structlog.typing.Processor]
    if sys.stderr.isatty():
        shape = [structlog.dev.ConsoleRenderer()]
    else:
        shape = [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            *shape,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_NUMBERS[level]),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )
