"""Files of a git repository: those it tracks, and those of one revision, read from its objects without a checkout.

Read with dulwich rather than with the command: no hook and no setting that lies in a repository is ever executed.
"""

import errno
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

    def read(self) -> bytes:
        """All of it. Raises `OSError` where a clone was made without it."""
        try:
            return self._repository.object_store[self._id].as_raw_string()  # type: ignore[index]
        except KeyError:
            raise OSError(errno.ENOENT, "this clone lacks its content") from None


def tracked_files(folder: Path) -> list[str] | None:
    """Paths relative to the folder of what the repository around it tracks below it; None where there is none.

    A folder of which nothing is tracked, such as one with installed packages, is none of the repository's. Raises
    `BadInput` where the repository is damaged.
    """
    from dulwich.index import IndexEntry

    with _around(folder) as found:
        if found is None:
            return None
        repository, below = found
        with _sound(repository):
            entries = list(repository.open_index().iteritems()) if repository.has_index() else []
        # a submodule is a repository of its own, a conflict has no one content
        files = {
            path
            for path, entry in entries
            if isinstance(entry, IndexEntry) and (stat.S_ISREG(entry.mode) or stat.S_ISLNK(entry.mode))
        }
        return _relative(files, below) or None


@contextmanager
def files_at(folder: Path, revision: str) -> Iterator[dict[str, Blob]]:
    """By path relative to the folder, what a revision has below it. Raises `BadInput`."""
    from dulwich.object_store import iter_tree_contents

    with _around(folder) as found:
        if found is None:
            raise BadInput(
                f"revision {revision!r}: {str(folder)!r} lies in no git repository; leave the field revision out."
            )
        repository, below = found
        commit = _commit(repository, revision)
        with _sound(repository):
            entries = list(iter_tree_contents(repository.object_store, commit.tree))
        blobs = {}
        for entry in entries:
            if entry.path is not None and entry.sha is not None and entry.mode and not _is_submodule(entry.mode):
                for name in _relative({entry.path}, below):
                    blobs[name] = Blob(repository, entry.mode, entry.sha)
        yield blobs


def _is_submodule(mode: int) -> bool:
    return stat.S_IFMT(mode) == 0o160000


@contextmanager
def _around(folder: Path) -> "Iterator[tuple[Repo, bytes] | None]":
    """The repository that a folder lies in, and where in it, as its paths begin; None where it lies in none."""
    from dulwich.errors import NotGitRepository
    from dulwich.repo import Repo, UnsupportedExtension, UnsupportedVersion

    here = folder.resolve()
    try:
        repository = Repo.discover(str(here))
    except (NotGitRepository, FileNotFoundError):
        yield None
        return
    except (UnsupportedExtension, UnsupportedVersion, ValueError) as error:
        raise BadInput(
            f"source {str(folder)!r}: its git repository is of a kind that is not read here ({error}); give a copy "
            "of its files without `.git`."
        ) from None
    with repository:
        below = here.relative_to(Path(repository.path).resolve()).as_posix()
        yield repository, b"" if below == "." else below.encode() + b"/"


@contextmanager
def _sound(repository: "Repo") -> Iterator[None]:
    """Whatever a damaged repository makes dulwich stumble over comes out as `BadInput`."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise BadInput(
            f"source: the git repository {repository.path!r} cannot be read ({reason}); repair it, or give a copy of "
            "its files without `.git`."
        ) from None


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
