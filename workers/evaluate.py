"""A batch of samples in, outcomes, scores and timings out. Plain Python: no Ray, no SQL.

Each batch is prefilled once; every policy completes it from a copy of that prefill, in an order drawn for the batch;
texts are scored when all policies are done, so that scoring never disturbs a timing.
"""

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from db.records import OutcomeRow, SampleRow, ScoreRow, ShardResults, TimingRow, TokenArrays
from engine.errors import NumericalError, OutOfMemory
from engine.memory import release
from engine.record import Completion, Decoded, TokenRecords
from engine.spec import PolicySpec
from workers.benchmarks.ends import Ends, cut
from workers.benchmarks.sample import text_hash
from workers.scoring.metrics import score_text, score_tokens

if TYPE_CHECKING:
    from engine.engine import Engine, Prefilled
    from engine.text import Prompt

#: what a sample ends with under a policy: a completion, or a sentence that says why there is none
Ending = Completion | str

#: nanoseconds of a prefill, and what one policy made of it
Part = tuple[int, Decoded]

#: by run, what was decoded for the samples of a batch that could not be done together
Parts = dict[int, list[Part]]

#: the samples of a batch that could not be done together, as they are tried next
Pieces = list[Sequence[SampleRow]]


@dataclass(frozen=True)
class Run:
    """One policy of the job on the shard's benchmark."""

    id: int
    policy: PolicySpec
    #: it is in the record already: done again so that the runs that are not have full depth beside them
    is_done: bool = False


@dataclass(frozen=True)
class Evaluation:
    """How the batches of one benchmark of a job are evaluated."""

    engine: "Engine"
    runs: Sequence[Run]
    content_hash: str  #: of the benchmark
    ends: Ends
    max_new_tokens: int
    metrics: dict[str, str]  #: name -> version
    seed: int
    timed: bool  #: whether the worker is alone on its device
    #: called before each step that takes long; raises to give the batch up
    proceed: Callable[[], None] = lambda: None
    store_text: bool = True  #: whether the record may have what was written, or its hash alone

    def together(self, batch: int, samples: Sequence[SampleRow]) -> ShardResults:
        """Evaluate a batch; in pieces where that fails: alone where the model does, halved where memory is too small.

        Samples done in pieces are marked isolated and not timed. One that cannot be done alone gets an error.
        """
        tried = self._try(batch, samples)
        if isinstance(tried, list):
            return self._in_pieces(batch, samples, tried)
        full = next((tried[run.id] for run in self.runs if run.is_done), None)
        timings = [self._timing(run, batch, len(samples), [tried[run.id]], self.timed, full) for run in self.missing]
        return self._results(samples, self._endings(tried), timings, isolated=False)

    def alone(
        self,
        batch: int,
        samples: Sequence[SampleRow],
        *,
        guilty: Collection[int] = (),
        announce: Callable[[SampleRow], None] = lambda sample: None,
    ) -> ShardResults:
        """Evaluate the samples of a batch one by one: isolated, untimed. A sample that cannot be done gets an error.

        guilty: positions of samples that are known to end the process; not tried again.
        announce: told each sample before anything is done with it.
        """
        parts: Parts = {run.id: [] for run in self.runs}
        done = []
        for sample in samples:
            endings: dict[int, list[Ending]]
            if sample.position in guilty:
                endings = self._all_end("the worker's process ended whenever it did this sample")
            else:
                announce(sample)
                endings = self._decode_alone(sample, parts)
            done.append(self._results([sample], endings, [], isolated=True))
        return joined([*done, self._untimed(batch, samples, parts)])

    @property
    def missing(self) -> list[Run]:
        """The runs whose results are wanted."""
        return [run for run in self.runs if not run.is_done]

    def order(self, batch: int) -> list[Run]:
        """The runs in the order in which this batch takes them: random, and the same for whoever does the batch."""
        runs = list(self.runs)
        random.Random(f"{self.seed} {self.content_hash} {batch}").shuffle(runs)
        return runs

    def _try(self, batch: int, samples: Sequence[SampleRow]) -> dict[int, Part] | Pieces:
        """For each run what decoding gave, or the pieces to try instead."""
        try:
            return self._decode_together(batch, samples)
        except NumericalError:
            return [[sample] for sample in samples]
        except OutOfMemory:
            pass
        release(self.engine.device)  # here, where the error that held the batch is gone
        middle = len(samples) // 2
        return [half for half in (samples[:middle], samples[middle:]) if half]

    def _in_pieces(self, batch: int, samples: Sequence[SampleRow], pieces: Pieces) -> ShardResults:
        """Untimed: a batch in pieces says nothing about the speed of whole ones."""
        parts: Parts = {run.id: [] for run in self.runs}
        done = [self._piece(batch, piece, parts) for piece in pieces]
        return joined([*done, self._untimed(batch, samples, parts)])

    def _piece(self, batch: int, samples: Sequence[SampleRow], parts: Parts) -> ShardResults:
        """The results of some samples of a batch, in smaller pieces where need be; what was decoded goes to `parts`."""
        if len(samples) == 1:
            return self._results(samples, self._decode_alone(samples[0], parts), [], isolated=True)
        tried = self._try(batch, samples)
        if isinstance(tried, list):
            return joined([self._piece(batch, piece, parts) for piece in tried])
        for run in self.runs:
            parts[run.id].append(tried[run.id])
        return self._results(samples, self._endings(tried), [], isolated=True)

    def _decode_together(self, batch: int, samples: Sequence[SampleRow]) -> dict[int, Part]:
        """What decoding gave for each run. Raises `NumericalError`, `OutOfMemory`."""
        self.proceed()
        prompts = self.engine.encode(
            [sample.prompt for sample in samples], self.max_new_tokens, heal=self.ends != "text"
        )
        prefilled = self._prefill(prompts)
        decoded = {}
        for run in self.order(batch):
            self.proceed()
            mine = prefilled[run.policy.untuned]
            decoded[run.id] = (mine.prefill_ns, self._decode(mine, run))
        return decoded

    def _prefill(self, prompts: "list[Prompt]") -> "dict[bool, Prefilled]":
        """Once for each weight set that a run needs, by `untuned`. Raises `NumericalError`, `OutOfMemory`."""
        sets = sorted({run.policy.untuned for run in self.runs})
        return {untuned: self.engine.prefill(prompts, self.max_new_tokens, untuned=untuned) for untuned in sets}

    def _decode_alone(self, sample: SampleRow, parts: Parts) -> dict[int, list[Ending]]:
        """How one sample ends under each run; what was decoded for it is added to `parts`."""
        self.proceed()
        prompts = self.engine.encode([sample.prompt], self.max_new_tokens, heal=self.ends != "text")
        try:
            prefilled = self._prefill(prompts)
        except (NumericalError, OutOfMemory) as error:
            return self._all_end(reason_of(error))
        endings: dict[int, list[Ending]] = {}
        for run in self.runs:
            self.proceed()
            try:
                mine = prefilled[run.policy.untuned]
                decoded = self._decode(mine, run)
            except (NumericalError, OutOfMemory) as error:
                endings[run.id] = [reason_of(error)]
                release(self.engine.device)
            else:
                endings[run.id] = [*decoded.completions]
                parts[run.id].append((mine.prefill_ns, decoded))
        return endings

    def _decode(self, prefilled: "Prefilled", run: Run) -> Decoded:
        return self.engine.decode(
            prefilled, run.policy, max_new_tokens=self.max_new_tokens, ends_with_line=self.ends == "line"
        )

    def _all_end(self, error: str) -> dict[int, list[Ending]]:
        return {run.id: [error] for run in self.runs}

    def _endings(self, decoded: dict[int, Part]) -> dict[int, list[Ending]]:
        return {run.id: [*decoded[run.id][1].completions] for run in self.runs}

    def _untimed(self, batch: int, samples: Sequence[SampleRow], parts: Parts) -> ShardResults:
        timings = [self._timing(run, batch, len(samples), parts[run.id], timed=False) for run in self.missing]
        return ShardResults(timings=timings)

    def _timing(
        self, run: Run, batch: int, rows: int, parts: Sequence[Part], timed: bool, full: Part | None = None
    ) -> TimingRow:
        """full: what full depth made of the same prefill, where its run is done already."""
        return TimingRow(
            run_id=run.id,
            batch=batch,
            rows=rows,
            prefill_ns=sum(prefill_ns for prefill_ns, _ in parts),
            decode_ns=sum(decoded.decode_ns for _, decoded in parts),
            decode_tokens=sum(decoded.decode_tokens for _, decoded in parts),
            flops=sum(decoded.flops for _, decoded in parts),
            ideal_ns=sum(decoded.ideal_ns for _, decoded in parts),
            device_class=self.engine.device_class,
            timed=timed,
            drafted=sum(decoded.drafted for _, decoded in parts),
            drafts_kept=sum(decoded.drafts_kept for _, decoded in parts),
            full_decode_ns=None if full is None else full[1].decode_ns,
        )

    def _results(
        self,
        samples: Sequence[SampleRow],
        endings: dict[int, list[Ending]],
        timings: list[TimingRow],
        *,
        isolated: bool,
    ) -> ShardResults:
        full = next((endings[run.id] for run in self.runs if run.policy.kind == "full"), [None] * len(samples))
        outcomes, scores = [], []
        for run in self.missing:
            for sample, written, reference in zip(samples, endings[run.id], full, strict=True):
                ending = self._up_to_its_end(sample, written)
                outcome = _outcome(run, sample, ending, isolated)
                outcomes.append(outcome if self.store_text else _withheld(outcome, sample))
                if isinstance(ending, Completion):
                    scores += self._scores(run, sample, ending, reference)
        return ShardResults(outcomes, scores, timings)

    def _up_to_its_end(self, sample: SampleRow, ending: Ending) -> Ending:
        """A completion's text as it is kept and scored; its tokens are all that were decoded."""
        if isinstance(ending, str):
            return ending
        return replace(ending, text=cut(sample.prompt, ending.text, self.ends, sample.language))

    def _scores(self, run: Run, sample: SampleRow, completion: Completion, full: Ending | None) -> list[ScoreRow]:
        values = score_text(list(self.metrics), completion.text, sample.reference)
        if isinstance(full, Completion):
            values |= score_tokens(list(self.metrics), completion.token_ids, full.token_ids)
        return [ScoreRow(run.id, sample.id, name, self.metrics[name], value) for name, value in values.items()]


def joined(parts: Sequence[ShardResults]) -> ShardResults:
    """The results of several batches as those of one shard."""
    return ShardResults(
        outcomes=[row for part in parts for row in part.outcomes],
        scores=[row for part in parts for row in part.scores],
        timings=[row for part in parts for row in part.timings],
        traces=[row for part in parts for row in part.traces],
    )


def reason_of(error: NumericalError | OutOfMemory) -> str:
    """Why a sample that was done alone has no completion."""
    return f"done alone, this sample ran {error}" if isinstance(error, OutOfMemory) else str(error)


def _outcome(run: Run, sample: SampleRow, ending: Ending, isolated: bool) -> OutcomeRow:
    if isinstance(ending, str):
        return OutcomeRow(
            run.id, sample.id, text=None, error=ending, finish=None, n_tokens=0, prompt_tokens=0, cut_tokens=0,
            shown=False, tokens=None, isolated=isolated,
        )  # fmt: skip
    return OutcomeRow(
        run_id=run.id,
        sample_id=sample.id,
        text=ending.text,
        error=None,
        finish=ending.finish.value,
        n_tokens=ending.n_tokens,
        prompt_tokens=ending.prompt_tokens,
        cut_tokens=ending.cut_tokens,
        shown=not (ending.stopped and run.policy.on_stop == "suppress"),
        tokens=_arrays(ending.records),
        isolated=isolated,
    )


def _withheld(outcome: OutcomeRow, sample: SampleRow) -> OutcomeRow:
    """The outcome without its text: the hash of it, and no token's id, for these would spell it out."""
    if outcome.text is None or outcome.tokens is None:
        return outcome
    nothing = np.full_like(outcome.tokens.token_ids, -1)
    return replace(
        outcome,
        text=text_hash(sample.prompt, outcome.text),
        tokens=replace(outcome.tokens, token_ids=nothing),
    )


def _arrays(records: TokenRecords) -> TokenArrays:
    return TokenArrays(
        records.token_ids,
        records.exit_layers,
        records.layers_run,
        records.decisions,
        records.confidences,
        records.drafts,
    )
