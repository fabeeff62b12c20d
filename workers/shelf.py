"""The engine that a worker keeps, looked up, checked against what a job pins, and loaded."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING

from filelock import FileLock

from db import devices, jobs
from db.session import Database
from engine.errors import BadInput, WeightsMismatch
from engine.loading import resolve_model
from workers.bundle import unpack
from workers.pinned import EngineKey, Pinned

if TYPE_CHECKING:
    from engine.engine import Engine


class EngineShelf:
    """The one engine that a worker keeps; another job may need another."""

    def __init__(self, db: Database, cache: Path) -> None:
        self.db = db
        self.cache = cache
        self._key: EngineKey | None = None
        self._engine: Engine | None = None

    def take(self, pinned: Pinned) -> "Engine":
        """The engine that a job pins. Raises `BadInput`, `WeightsMismatch`."""
        key = pinned.engine
        if self._engine is None or key != self._key:
            self._engine = None  # two models may not fit into memory
            _check_device(pinned)
            self._look_at(pinned)
            self._engine, self._key = self._load(pinned), key
        return self._engine

    def _load(self, pinned: Pinned) -> "Engine":
        from engine.engine import Engine

        exits = None
        if pinned.exits_hash is not None:
            exits = unpack(jobs.artifact(self.db, pinned.exits_hash), pinned.exits_hash, self.cache)
        engine = Engine(
            pinned.model,
            exits,
            device=pinned.device,
            dtype=pinned.dtype,
            threads=pinned.threads,
            compile=pinned.compile,
        )
        self._measure(engine)
        return engine

    def _look_at(self, pinned: Pinned) -> None:
        """Whether the model is here the one that the job pins, before a weight is loaded. Raises `BadInput`,
        `WeightsMismatch`.
        """
        self.cache.mkdir(parents=True, exist_ok=True)
        lock = self.cache / f"model-{hashlib.sha256(pinned.model.encode()).hexdigest()[:12]}.lock"
        # Of the workers of a machine that start together one downloads, converts and hashes; the others find it done.
        with FileLock(lock):
            facts = resolve_model(pinned.model)
        if facts.weights_hash != pinned.weights_hash:
            raise WeightsMismatch(
                f"model {pinned.model!r} has weights {facts.weights_hash[:12]}… on {gethostname()}, but the job was "
                f"prepared with {pinned.weights_hash[:12]}…; bring those back, or submit the job again."
            )
        if facts.tokenizer_hash != pinned.tokenizer_hash:
            raise WeightsMismatch(
                f"model {pinned.model!r} has another tokenizer on {gethostname()} than the job was prepared with; "
                "bring that one back, or submit the job again."
            )

    def _measure(self, engine: "Engine") -> None:
        """Kernels and machine, once per device class: neither a result nor an ideal time depends on who did a batch."""
        from engine.cost import Machine

        name, db = engine.device_class, self.db
        self.cache.mkdir(parents=True, exist_ok=True)
        # Workers of one machine that start together would disturb each other's measurement.
        with FileLock(self.cache / "measuring.lock"):
            engine.kernels = devices.kernel_plan(db, name, engine.matrix_shapes, engine.measure_kernels)
            engine.machine = Machine(**devices.device_plan(db, name, lambda: asdict(engine.machine)))


def _check_device(pinned: Pinned) -> None:
    """Raises `BadInput` where the job is for devices of another class than this machine's."""
    if pinned.only_on is None:
        return
    from engine.device import describe_device_class, find_device

    here = describe_device_class(find_device(pinned.device), pinned.dtype, pinned.threads)
    if here != pinned.only_on:
        raise BadInput(
            f"device_class is {pinned.only_on!r}, but {gethostname()} is {here!r}; work on a machine of that class, or "
            "submit the job again without it."
        )
