"""Token ids back to text, for examples that show each token."""

from threading import Lock
from typing import TYPE_CHECKING, Any

from db.jobs import job
from db.session import Database
from engine.errors import BadInput
from engine.loading import load_tokenizer, resolve_model

if TYPE_CHECKING:
    from cluster.reports.examples import Decode

#: transformers, when two threads of a server import it at once, lacks half of its names in one of them
_LOADING = Lock()


def decoder(db: Database, job_id: int) -> "Decode | None":
    """The texts of token ids, one each, by the tokenizer that the job pinned; None where it is not on this machine."""
    pinned = job(db, job_id).pinned
    if pinned is None or "tokenizer_hash" not in pinned:  # the latter where all completions were made elsewhere
        return None
    with _LOADING:
        return _decoder(pinned)


def _decoder(pinned: dict[str, Any]) -> "Decode | None":
    try:
        if resolve_model(pinned["model"]).tokenizer_hash != pinned["tokenizer_hash"]:
            return None
        tokenizer = load_tokenizer(pinned["model"])
    except BadInput:
        return None
    return lambda ids: tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
