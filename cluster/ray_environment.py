"""What Ray reads from the environment when it is imported, and never again. So this comes before `cluster.fleet`."""

import os
import secrets
import sys
from pathlib import Path

_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_worker_niceness": "0",  # of 15 by default: a timing would depend on whatever else the machine does
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # what Ray says of a dead worker goes to standard output, amid our JSON
}


def set_up_ray(address: str | None = None) -> None:
    """Make Ray quiet, and a local one private to its own processes. What a user has set stays.

    address: of a cluster to join; whether that asks for a token is its owner's affair, and a token that it does not
    know would cut the cluster off from us.
    """
    if "ray" in sys.modules:
        return
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if address is None and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        if not _has_token():
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _has_token() -> bool:
    named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
    return bool(named) or (Path.home() / ".ray" / "auth_token").exists()
