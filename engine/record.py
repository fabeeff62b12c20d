"""What is reported of a token and of a completion. No torch here: workers and reports read these."""

from dataclasses import dataclass
from enum import IntEnum, StrEnum

import numpy as np
import numpy.typing as npt


class Decision(IntEnum):
    """What happened to a token."""

    FULL = 0  #: all layers were run before the token was chosen
    EXIT = 1  #: the token left at an exit point
    STOP = 2  #: generation was given up here; the row has no token


class Finish(StrEnum):
    """Why a completion ended."""

    EOS = "eos"  #: the model wrote its end-of-sequence token
    LENGTH = "length"  #: `max_new_tokens` were written
    LINE = "line"  #: the task ends with the line, and the line ended
    STOP = "stop"  #: the policy gave up


@dataclass(frozen=True)
class TokenRecords:
    """Parallel arrays, one place per generated token; a stop is the last place, with token id -1."""

    token_ids: npt.NDArray[np.int32]  # [n]
    exit_layers: npt.NDArray[np.int16]  # [n] layers run when the token was chosen
    layers_run: npt.NDArray[np.int16]  # [n] layers computed for the token in the end, debts included
    decisions: npt.NDArray[np.int16]  # [n] Decision
    confidences: npt.NDArray[np.float32]  # [n] see Completion.confidences
    #: [n] 0: never a draft; L: drafted after layer L, and full depth agreed; -L: it did not, and this is its own choice
    drafts: npt.NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Completion:
    """What one policy produced for one prompt."""

    text: str
    records: TokenRecords
    finish: Finish
    prompt_tokens: int  #: length of the prompt as the model saw it
    cut_tokens: int  #: tokens cut from the prompt's left so that it fits the context

    @property
    def stopped(self) -> bool:
        return self.finish is Finish.STOP

    @property
    def n_tokens(self) -> int:
        """Tokens written; a stop writes none."""
        return len(self.records) - self.stopped

    @property
    def token_ids(self) -> list[int]:
        return self.records.token_ids[: self.n_tokens].tolist()

    @property
    def exit_layers(self) -> list[int]:
        """Layers run before each token was chosen; a stop is the last entry."""
        return self.records.exit_layers.tolist()

    @property
    def layers_run(self) -> list[int]:
        return self.records.layers_run.tolist()

    @property
    def decisions(self) -> list[str]:
        return [Decision(d).name.lower() for d in self.records.decisions.tolist()]

    @property
    def confidences(self) -> list[float]:
        """The probability that the predicting head gave to its token; for a stop, the controller's for stopping."""
        return self.records.confidences.tolist()

    @property
    def draft_layers(self) -> list[int | None]:
        """Layers after which each token was drafted; None where it was not."""
        return [abs(draft) or None for draft in self.records.drafts.tolist()]

    @property
    def draft_kept(self) -> list[bool | None]:
        """Whether full depth agreed with the draft; None where there was none."""
        return [draft > 0 if draft else None for draft in self.records.drafts.tolist()]


@dataclass(frozen=True)
class Decoded:
    """What one policy made of one prefilled batch."""

    completions: list[Completion]
    decode_ns: int  #: wall time of all steps after prefill, device synchronised
    decode_tokens: int  #: tokens written by those steps; each row's first token comes out of prefill
    flops: int  #: of those steps, by the cost model
    ideal_ns: int  #: of those steps, by the cost model on this machine
    drafted: int = 0  #: tokens that were drafted, those included that were undone because one before them was wrong
    drafts_kept: int = 0  #: drafts that full depth agreed with
