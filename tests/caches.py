"""A cache for a session of tests, beside the user's."""

from pathlib import Path

from engine.loading import cache_folder

#: what takes a minute to make, and is the same whoever makes it: converted weights, compiled loops
_SHARED = ("models", "numba")


def cache_beside_the_users(folder: Path) -> Path:
    """The folder, empty but for what the user's cache has of `_SHARED`, which is written there too."""
    for name in _SHARED:
        shared = cache_folder() / name
        shared.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(shared)
    return folder
