"""`latest`: the newest model or exits in a folder, looked up when a schedule fires, and recorded with the firing.

`/models/nightly/latest` is the folder that a link of that name points at, or else the newest folder in
`/models/nightly` that holds a model, or exits. Newest is: whose `config.json` or `exits.json` was written last.
"""

from collections.abc import Callable
from pathlib import Path

from cluster.spec import JobSpec
from engine.errors import BadInput

WORD = "latest"
#: what a folder must hold, by field of the spec
_MARKS = {"model": "config.json", "exits": "exits.json"}


def is_latest(value: str | None) -> bool:
    """Whether a field of a spec asks for the latest of a folder."""
    return value is not None and "/" in value and value.rsplit("/", 1)[1] == WORD


def resolved(spec: JobSpec) -> tuple[JobSpec, dict[str, str]]:
    """The spec with what `latest` is now, and that by field. Raises `BadInput` where there is none."""
    asked = {"model": spec.model, "exits": spec.exits}
    found = {field: str(_newest(field, Path(value))) for field, value in asked.items() if value and is_latest(value)}
    return (spec.model_copy(update=found) if found else spec), found


def without_latest(spec: JobSpec, change: Callable[[JobSpec], JobSpec], *, stand_in: str | None = None) -> JobSpec:
    """`change` applied to a spec without `latest`, which is put back afterwards.

    The folders that it is looked up in stand in its place meanwhile, and are changed; or the stand-in, and they stay.
    """
    asked = {"model": spec.model, "exits": spec.exits}
    latest = {field: value for field, value in asked.items() if value and is_latest(value)}
    folders = {field: value.rsplit("/", 1)[0] or "/" for field, value in latest.items()}
    changed = change(spec.model_copy(update={field: stand_in or folder for field, folder in folders.items()}))
    if stand_in is not None:
        return changed.model_copy(update=latest)
    return changed.model_copy(update={field: f"{getattr(changed, field).rstrip('/')}/{WORD}" for field in folders})


def _newest(field: str, asked: Path) -> Path:
    """Raises `BadInput`."""
    mark = _MARKS[field]
    try:
        return _linked(field, asked, mark) if asked.exists() else _written_last(field, asked, mark)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise BadInput(f"{field} {str(asked)!r} cannot be looked up ({reason}); give a folder of folders.") from None


def _linked(field: str, asked: Path, mark: str) -> Path:
    """What a link points at must lie in the folder: so a link leads nobody where the server would not read."""
    found = asked.resolve(strict=True)
    if not found.is_relative_to(asked.parent.resolve()):
        raise BadInput(f"{field} {str(asked)!r} points out of its folder, at {str(found)!r}; let it point into it.")
    if not (found / mark).is_file():
        raise BadInput(f"{field} {str(asked)!r} points at {str(found)!r}, which has no {mark}; correct the link.")
    return found


def _written_last(field: str, asked: Path, mark: str) -> Path:
    able = [one for one in asked.parent.iterdir() if (one / mark).is_file()]
    if not able:
        raise BadInput(f"{field} {str(asked)!r}: no folder in {str(asked.parent)!r} has {mark}; put one there.")
    newest = max(able, key=lambda one: ((one / mark).stat().st_mtime_ns, one.name)).resolve()
    if not newest.is_relative_to(asked.parent.resolve()):
        raise BadInput(f"{field} {str(asked)!r}: the newest, {str(newest)!r}, lies elsewhere; put it into the folder.")
    return newest
