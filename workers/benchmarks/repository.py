"""Files of a git repository: those it tracks, and those of one revision, read from its objects without a checkout.

Read with dulwich rather than with the command: no hook and no setting that lies in a repository is ever executed.
"""

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import BadInput

if TYPE_CHECKING:
    from dulwich.objects import Commit
    from dulwich.repo import Repo


class Blob:
    """A file of a revision, which is read when it is wanted."""

    def __init__(self, repository: "Repo", mode: int, id: bytes) -> None:
        self._repository, self._id = repository, id
        self.is_link = stat.S_ISLNK(mode)

    @property
    def size(self) -> int:
        """In bytes."""
        return int(self._repository.object_store[self._id].raw_length())  # type: ignore[index]

    def read(self) -> bytes:
        """All of it."""
        return self._repository.object_store[self._id].as_raw_string()  # type: ignore[index]


def tracked_files(folder: Path) -> list[str] | None:
    """Paths relative to the folder of what the repository around it tracks below it; None where there is none.

    A folder of which nothing is tracked, such as one with installed packages, is none of the repository's.
    """
    from dulwich.errors import NotGitRepository
    from dulwich.index import IndexEntry

    try:
        with _around(folder) as (repository, below):
            entries = repository.open_index().iteritems() if repository.has_index() else iter(())
            # a submodule is a repository of its own, a conflict has no one content
            found = {
                path
                for path, entry in entries
                if isinstance(entry, IndexEntry) and (stat.S_ISREG(entry.mode) or stat.S_ISLNK(entry.mode))
            }
            return _relative(found, below) or None
    except (NotGitRepository, FileNotFoundError):
        return None


@contextmanager
def files_at(folder: Path, revision: str) -> Iterator[dict[str, Blob]]:
    """By path relative to the folder, what a revision has below it. Raises `BadInput`."""
    from dulwich.errors import NotGitRepository
    from dulwich.object_store import iter_tree_contents

    try:
        with _around(folder) as (repository, below):
            commit = _commit(repository, revision)
            found = {}
            for entry in iter_tree_contents(repository.object_store, commit.tree):
                if entry.path is not None and entry.sha is not None and entry.mode and not _is_submodule(entry.mode):
                    for name in _relative({entry.path}, below):
                        found[name] = Blob(repository, entry.mode, entry.sha)
            yield found
    except NotGitRepository:
        raise BadInput(
            f"revision {revision!r}: {str(folder)!r} lies in no git repository; leave the field revision out."
        ) from None


def _is_submodule(mode: int) -> bool:
    return stat.S_IFMT(mode) == 0o160000


@contextmanager
def _around(folder: Path) -> "Iterator[tuple[Repo, bytes]]":
    """The repository that a folder lies in, and where in it, as its paths begin."""
    from dulwich.repo import Repo

    here = folder.resolve()
    with Repo.discover(str(here)) as repository:
        below = here.relative_to(Path(repository.path).resolve()).as_posix()
        yield repository, b"" if below == "." else below.encode() + b"/"


def _relative(paths: set[bytes], below: bytes) -> list[str]:
    """Names that are not UTF-8 keep their bytes as the file system gives them."""
    return [path[len(below) :].decode("utf-8", "surrogateescape") for path in paths if path.startswith(below)]


def _commit(repository: "Repo", revision: str) -> "Commit":
    """By branch, tag, number, or one of these with `~2` or `^`. Raises `BadInput`."""
    from dulwich.objects import Commit
    from dulwich.objectspec import parse_commit, parse_object

    for parse in (parse_object, parse_commit):  # only the latter knows short numbers
        try:
            found = parse(repository, revision.encode())
            if not isinstance(found, Commit):
                found = parse_commit(repository, found)  # type: ignore[arg-type]
            return found
        except (KeyError, ValueError, NotImplementedError, AttributeError):
            continue
    raise BadInput(
        f"revision {revision!r} is not in the repository {repository.path!r}; give a branch, a tag or a commit of it."
    )
