"""What a submitted spec may read on the server: uploads, and the folders and names that its settings allow."""

import re
from collections.abc import Sequence
from pathlib import Path

from cluster.places import Field, placed
from cluster.spec import JobSpec
from engine.errors import BadInput

UPLOAD = "upload:"
_REFERENCE = re.compile(UPLOAD + r"([0-9a-f]{32})/([^\0]+)")
#: `dataset` is not among them: the files of a saved dataset name further files
_UPLOADED: tuple[Field, ...] = ("exits", "jsonl", "source")


class Allowed:
    """The rule of one server."""

    def __init__(self, allow: Sequence[str], uploads: Path) -> None:
        """allow: absolute folders; everything else is a name: a hub id, an installed package."""
        self._folders = [Path(entry).resolve() for entry in allow if Path(entry).is_absolute()]
        self._names = [entry for entry in allow if not Path(entry).is_absolute()]
        self._uploads = uploads.resolve()

    def checked(self, spec: JobSpec) -> JobSpec:
        """The spec with absolute paths, links and `..` resolved, all of them inside what is allowed.

        Raises `BadInput`, in words that do not tell whether there is such a file.
        """
        return placed(spec, self._place)

    def _place(self, field: Field, value: str) -> str:
        if value.startswith(UPLOAD):
            return self._uploaded(field, value)
        if value in self._names and field in ("model", "dataset", "source"):
            return value
        path = _resolved(value)
        if path is not None and any(path.is_relative_to(folder) for folder in self._folders):
            return str(path)
        raise BadInput(
            f"{field} {value!r} is not among what this server allows; upload it, or have it added to the setting allow."
        )

    def _uploaded(self, field: Field, value: str) -> str:
        reference = _REFERENCE.fullmatch(value)
        if field not in _UPLOADED or reference is None:
            raise BadInput(
                f"{field} {value!r}: an upload serves {', '.join(_UPLOADED)}, as {UPLOAD}ID/NAME; correct it."
            )
        root = self._uploads / reference[1]
        path = _resolved(str(root / reference[2]))
        if path is None or not path.is_relative_to(root) or not path.exists():
            raise BadInput(f"{field} {value!r}: there is no such upload; upload it again.")
        if field == "jsonl" and path.suffix == ".gz":
            raise BadInput(f"{field} {value!r}: upload the file unpacked; what is in it must be known in size.")
        return str(path)


def _resolved(value: str) -> Path | None:
    path = Path(value)
    try:
        return path.resolve() if path.is_absolute() else None
    except (OSError, RuntimeError, ValueError):  # a circle of links, a NUL, a name too long
        return None
