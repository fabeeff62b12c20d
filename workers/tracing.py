"""A batch of samples in, the traces of their targets out. No policy is run: nothing is decided."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from db.records import OutcomeRow, SampleRow, ShardResults, TimingRow, TokenArrays, TraceArrays, TraceRow
from engine.errors import NumericalError, OutOfMemory
from engine.memory import release
from engine.record import Finish
from engine.spec import Full
from engine.text import Prompt
from workers.benchmarks.ends import Ends
from workers.evaluate import reason_of

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.trace import TracedBatch


@dataclass(frozen=True)
class TraceEvaluation:
    """How the batches of one benchmark of a trace are done: as `workers.evaluate.Evaluation`, for its one run.

    Each sample ends with an outcome like any other: its text is the target, and no token of it was decided on.
    """

    engine: "Engine"
    run_id: int
    target: Literal["reference", "full"]
    ends: Ends
    max_new_tokens: int
    timed: bool  #: whether the worker is alone on its device
    proceed: Callable[[], None] = lambda: None

    def together(self, batch: int, samples: Sequence[SampleRow]) -> ShardResults:
        """Trace a batch; in pieces, untimed, where that fails. A sample that cannot be done alone gets an error."""
        return self._finished(batch, samples, self._some(samples, isolated=False))

    def alone(
        self,
        batch: int,
        samples: Sequence[SampleRow],
        *,
        guilty: Collection[int] = (),
        announce: Callable[[SampleRow], None] = lambda sample: None,
    ) -> ShardResults:
        """Trace the samples of a batch one by one, see `Evaluation.alone`."""
        done = _Done()
        for sample in samples:
            if sample.position in guilty:
                done.outcomes.append(self._error(sample, "the worker's process ended whenever it did this sample"))
                continue
            announce(sample)
            done.add(self._some([sample], isolated=True))
        return self._finished(batch, samples, done)

    def _some(self, samples: Sequence[SampleRow], *, isolated: bool) -> "_Done":
        try:
            return self._try(samples, isolated)
        except (NumericalError, OutOfMemory) as error:
            if len(samples) == 1:
                done = _Done(isolated=True)
                done.outcomes.append(self._error(samples[0], reason_of(error)))
                return done
            in_halves = isinstance(error, OutOfMemory)
        release(self.engine.device)
        size = (len(samples) + 1) // 2 if in_halves else 1
        done = _Done()
        for first in range(0, len(samples), size):
            done.add(self._some(samples[first : first + size], isolated=True))
        return done

    def _try(self, samples: Sequence[SampleRow], isolated: bool) -> "_Done":
        """Raises `NumericalError`, `OutOfMemory`."""
        self.proceed()
        texts = [sample.prompt for sample in samples]
        prompts = self.engine.encode(texts, self.max_new_tokens, heal=self.ends != "text")
        targets, written = self._targets(samples, prompts)
        done = _Done(isolated=isolated)
        for sample, prompt, target, text in zip(samples, prompts, targets, written, strict=True):
            done.outcomes.append(self._outcome(sample, prompt, text, isolated))
            done.tokens += len(target)
        some = [place for place, target in enumerate(targets) if target]  # an empty reference has nothing to trace
        if some:
            self.proceed()
            done.batch = self.engine.trace([prompts[i] for i in some], [targets[i] for i in some])
            done.traces = [
                self._row(samples[i], prompts[i], TraceArrays(**vars(trace)))
                for i, trace in zip(some, done.batch.traces, strict=True)
            ]
        return done

    def _targets(self, samples: Sequence[SampleRow], prompts: list[Prompt]) -> tuple[list[list[int]], list[str]]:
        """Token ids of each target, and its text."""
        if self.target == "reference":
            references = [sample.reference for sample in samples]
            texts = [sample.prompt for sample in samples]
            return self.engine.text.targets(texts, prompts, references, self.max_new_tokens), references
        prefilled = self.engine.prefill(prompts, self.max_new_tokens)
        self.proceed()
        decoded = self.engine.decode(
            prefilled, Full(), max_new_tokens=self.max_new_tokens, ends_with_line=self.ends == "line"
        )
        return [done.token_ids for done in decoded.completions], [done.text for done in decoded.completions]

    def _finished(self, batch: int, samples: Sequence[SampleRow], done: "_Done") -> ShardResults:
        parts = [done.batch] if done.batch else done.parts
        price = [self.engine.price(part.work) for part in parts]
        timing = TimingRow(
            run_id=self.run_id,
            batch=batch,
            rows=len(samples),
            prefill_ns=sum(part.pass_ns for part in parts),
            decode_ns=sum(part.heads_ns for part in parts),
            decode_tokens=done.tokens,
            flops=sum(one.flops for one in price),
            ideal_ns=sum(one.ideal_ns for one in price),
            device_class=self.engine.device_class,
            timed=self.timed and bool(done.batch) and not done.isolated,
        )
        return ShardResults(outcomes=done.outcomes, timings=[timing], traces=done.traces)

    def _row(self, sample: SampleRow, prompt: Prompt, arrays: TraceArrays) -> TraceRow:
        return TraceRow(self.run_id, sample.id, len(prompt.token_ids), prompt.key, arrays)

    def _outcome(self, sample: SampleRow, prompt: Prompt, text: str, isolated: bool) -> OutcomeRow:
        return OutcomeRow(
            run_id=self.run_id,
            sample_id=sample.id,
            text=text,
            error=None,
            finish=Finish.LENGTH.value,
            n_tokens=0,
            prompt_tokens=len(prompt.token_ids),
            cut_tokens=prompt.cut_tokens,
            shown=False,
            tokens=_NO_TOKENS,
            isolated=isolated,
        )

    def _error(self, sample: SampleRow, error: str) -> OutcomeRow:
        return OutcomeRow(
            self.run_id, sample.id, text=None, error=error, finish=None, n_tokens=0, prompt_tokens=0, cut_tokens=0,
            shown=False, tokens=None, isolated=True,
        )  # fmt: skip


_NONE = np.zeros(0, np.int16)
_NO_TOKENS = TokenArrays(np.zeros(0, np.int32), _NONE, _NONE, _NONE, np.zeros(0, np.float32))


class _Done:
    """What was done of a batch."""

    def __init__(self, *, isolated: bool = False) -> None:
        self.outcomes: list[OutcomeRow] = []
        self.traces: list[TraceRow] = []
        self.tokens = 0
        self.isolated = isolated
        self.batch: TracedBatch | None = None  #: of samples done together
        self.parts: list[TracedBatch] = []  #: of those that were not

    def add(self, piece: "_Done") -> None:
        self.outcomes += piece.outcomes
        self.traces += piece.traces
        self.tokens += piece.tokens
        self.parts += [piece.batch] if piece.batch else piece.parts
