"""`shortstop lm-eval`: the tasks of lm-evaluation-harness on this engine."""

import sys
from importlib.util import find_spec

import typer

from engine.errors import BadInput


def lm_eval(context: typer.Context) -> None:
    """The command of lm-evaluation-harness, which here knows the model `shortstop`; all arguments are its own."""
    if find_spec("lm_eval") is None:
        raise BadInput("lm-eval is not installed; install it with: pip install 'shortstop[lm-eval]'.")
    from lm_eval.__main__ import cli_evaluate

    from workers import harness  # noqa: F401 - makes the model known

    sys.argv = ["lm-eval", *context.args]
    cli_evaluate()
