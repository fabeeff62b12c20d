"""Where a training writes: the folder that it makes in the end, its checkpoints beside it, and its log."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from engine.errors import BadInput
from engine.spec import Spec
from engine.training.checkpoint import Log
from engine.training.trainer import Losses, Report


@dataclass(frozen=True)
class Progress:
    """Where training stands."""

    stage: str
    done: int
    total: int
    unit: str
    loss: float | None = None
    exits: dict[int, float] = field(default_factory=dict)  #: loss by exit point, where the stage has one


OnProgress = Callable[[Progress], None]


class Workplace:
    """`out`, `out.work` and `out.log.jsonl`. Raises `BadInput` where one of them is somebody else's."""

    def __init__(self, out: Path, spec: Spec) -> None:
        self.spec = spec
        self.out = out = out.expanduser().absolute()
        self.work = work = out.with_name(out.name + ".work")
        self.log = Log(out.with_name(out.name + ".log.jsonl"))
        if any((out / made).exists() for made in ("exits.json", "config.json")):
            raise BadInput(f"out: {out} holds a bundle or a model already; give another folder, or remove that one.")
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise BadInput(f"out: {out} is there and not empty; give a folder that does not exist yet.")
        if work.exists() and not self._note.exists():
            raise BadInput(f"out: {work}, where checkpoints would go, is not of our making; give another folder.")
        if self._note.exists() and not self._is_ours():
            raise BadInput(
                f"out: {work} holds the checkpoint of another spec; give another folder, or remove that one."
            )

    def open(self) -> None:
        """Make the folder for checkpoints. Raises `BadInput`."""
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._note.write_text(self.spec.model_dump_json())
        except OSError as error:
            raise BadInput(f"out: {self.out} cannot be written ({error.strerror}); give another folder.") from None

    @property
    def _note(self) -> Path:
        return self.work / "spec.json"

    def _is_ours(self) -> bool:
        try:
            return type(self.spec).model_validate_json(self._note.read_text()) == self.spec
        except ValidationError:
            return False


def reported(on_progress: OnProgress, stage: str) -> Report:
    """What a trainer reports, as progress."""

    def report(done: int, total: int, losses: Losses) -> None:
        loss = losses.joint() / len(losses.exits) if losses.full is None else losses.full
        on_progress(Progress(stage, done, total, "tokens", loss, losses.exits))

    return report
