"""Where a page ended: an opaque word for the keys of its last row, so that rows written meanwhile move nothing."""

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode

from engine.errors import BadInput


def cursor(*keys: int) -> str:
    """The word for these keys."""
    return urlsafe_b64encode(json.dumps(keys).encode()).decode().rstrip("=")


def keys_of(word: str, count: int) -> tuple[int, ...]:
    """The keys again. Raises `BadInput` for a word that is none of ours."""
    try:
        keys = json.loads(urlsafe_b64decode(word + "=" * (-len(word) % 4)))
    except (ValueError, RecursionError):
        keys = None
    numbers = isinstance(keys, list) and all(type(key) is int and 0 <= key < 2**63 for key in keys)
    if not numbers or len(keys) != count:
        raise BadInput(f"cursor {ascii(word)[:60]}: give the `next` of a page as it came, or none to begin.")
    return tuple(keys)
