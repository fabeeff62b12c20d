r"""Shortstop: measures dynamic inference for code-completion models.

    import shortstop

    engine = shortstop.Engine("smollm2-135m", exits="smollm2-135m")
    done = engine.complete(["def add(a, b):\n    return"], policy=shortstop.policy("sec", exit=0.9, stop=0.7))
    report = shortstop.evaluate("examples/demo.yaml")
    report.table()

Names are imported when they are first used, so that `import shortstop` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import engine.waiting  # noqa: F401 - before numpy and torch, which a user may import next

if TYPE_CHECKING:
    from cluster.client import Client
    from cluster.embedded import add_policy, completions, evaluate, replay, report, rescore, tokens, traces
    from cluster.replays import ReplayReport
    from cluster.reports.model import JobReport, RunReport
    from cluster.spec import JobSpec
    from cluster.training import train
    from db.errors import RecordError
    from engine.engine import Engine
    from engine.errors import BadInput, EngineError
    from engine.record import Completion
    from engine.spec import PolicySpec, policy
    from engine.training.spec import TrainSpec

#: where each public name lives
_HOMES = {
    "BadInput": "engine.errors",
    "Client": "cluster.client",
    "Completion": "engine.record",
    "Engine": "engine.engine",
    "EngineError": "engine.errors",
    "JobReport": "cluster.reports.model",
    "JobSpec": "cluster.spec",
    "PolicySpec": "engine.spec",
    "RecordError": "db.errors",
    "ReplayReport": "cluster.replays",
    "RunReport": "cluster.reports.model",
    "TrainSpec": "engine.training.spec",
    "add_policy": "cluster.embedded",
    "completions": "cluster.embedded",
    "evaluate": "cluster.embedded",
    "policy": "engine.spec",
    "replay": "cluster.embedded",
    "report": "cluster.embedded",
    "rescore": "cluster.embedded",
    "tokens": "cluster.embedded",
    "traces": "cluster.embedded",
    "train": "cluster.training",
}

__all__ = [
    "BadInput",
    "Client",
    "Completion",
    "Engine",
    "EngineError",
    "JobReport",
    "JobSpec",
    "PolicySpec",
    "RecordError",
    "ReplayReport",
    "RunReport",
    "TrainSpec",
    "add_policy",
    "completions",
    "evaluate",
    "policy",
    "replay",
    "report",
    "rescore",
    "tokens",
    "traces",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shortstop' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
