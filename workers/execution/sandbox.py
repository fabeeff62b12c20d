"""A program in a sandbox: a process tree with a root, a network and a process table of its own, and limits.

Linux namespaces through `unshare`: no network, no processes but its own, a root in memory with Python read-only and a
folder that ends with it; no privileges, no environment, and none of the system calls that take memory which no process
is seen to hold. What runs is stopped by the processor seconds it took, not by a clock, so that a loaded machine changes
no result. It holds against completions, not against attackers with a fault of the kernel in hand; and a program that
wants to look as if it had passed can.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path

import psutil

from engine.errors import BadInput

_INSIDE = Path(__file__).with_name("inside.py")
#: users that nobody is; where we are root, whom no limit on processes binds, a tree belongs to one of its own
_NOBODIES = range(2**20, 2**21)
_POLL_SECONDS = 0.1
#: a tree that neither computes nor wants to for so long waits for something that never comes
_IDLE_SECONDS = 10
#: nobody waits longer for a tree, whatever it does: so many times its processor seconds
_LONGEST_WAIT = 60


class Ending(StrEnum):
    """What became of a program."""

    PASSED = "passed"
    FAILED = "failed"  #: it raised, exited or was killed by a limit of a single process
    SECONDS = "seconds"  #: the tree took more processor seconds than it may
    MEMORY = "memory"  #: the tree held more memory than it may
    IDLE = "idle"  #: it waited for something that never comes


@dataclass(frozen=True)
class Limits:
    """Of one program and all that it starts."""

    seconds: int = 10  #: processor seconds
    memory: int = 2**30  #: bytes
    file: int = 16 * 2**20  #: bytes of one file, and of all files together
    inodes: int = 4096  #: files and folders
    files: int = 64  #: open at once, in one process
    processes: int = 32  #: at once


def execute(program: str, limits: Limits = Limits()) -> Ending:
    """Run a Python program in a sandbox of its own. Raises `BadInput` where the sandbox cannot be had."""
    source = program.encode()
    if len(source) > limits.file:
        return Ending.FAILED  # its folder has no room for it
    reading, writing = os.pipe()
    try:
        process = _started(writing, limits)
    except OSError as error:
        os.close(reading)
        raise _refused(f"unshare cannot be started ({error.strerror})") from None
    finally:
        os.close(writing)
    with open(reading, "rb") as channel, process:
        try:
            assert process.stdin is not None
            assert process.stderr is not None
            _hand_over(process, source)
            stopped = _watched(process, limits)
        finally:
            _end(process)
        said = channel.read(64)
        if not said.startswith(b"ready"):
            raise _refused(process.stderr.read().decode(errors="replace").strip().split("\n")[-1] or "no reason given")
    return stopped or (Ending.PASSED if said == b"readypassed" else Ending.FAILED)


@cache
def check_sandbox() -> None:
    """Raises `BadInput` where there is no sandbox to be had on this machine."""
    if execute("") is not Ending.PASSED:
        raise _refused("an empty program does not run in it")


def _started(channel: int, limits: Limits) -> "subprocess.Popen[bytes]":
    unshare = shutil.which("unshare")
    if unshare is None:
        raise _refused("there is no command unshare (package util-linux)")
    is_root = os.geteuid() == 0
    python = str(Path(sys._base_executable).resolve())  # type: ignore[attr-defined]
    asked = {
        "channel": channel,
        "root": "/mnt" if os.path.isdir("/mnt") else "/tmp",
        "paths": _needed(python),
        "python": python,
        "user": secrets.choice(_NOBODIES) if is_root else None,
        "size": limits.file,
        "inodes": limits.inodes,
        "limits": {
            "RLIMIT_CPU": limits.seconds,
            "RLIMIT_AS": limits.memory,
            "RLIMIT_FSIZE": limits.file,
            "RLIMIT_NOFILE": limits.files,
            "RLIMIT_NPROC": limits.processes,
            "RLIMIT_CORE": 0,
        },
    }
    spaces = ["--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
    command = [
        unshare,
        *([] if is_root else ["--user", "--map-root-user"]),
        *spaces,
        python,
        "-I",
        "-S",
        "-B",
        str(_INSIDE),
        json.dumps(asked),
    ]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=(channel,),
        env={},
        cwd="/",
        start_new_session=True,
    )


def _needed(python: str) -> list[str]:
    """What Python must see of this machine: itself, its library, the system's libraries."""
    system = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache"]
    own = [path for path in (python, sys.base_prefix) if not path.startswith("/usr/")]
    return [path for path in [*system, *own] if os.path.lexists(path)]


def _hand_over(process: "subprocess.Popen[bytes]", source: bytes) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(source)
        process.stdin.close()
    except BrokenPipeError:  # it ended before it read: what it said tells why
        pass


def _watched(process: "subprocess.Popen[bytes]", limits: Limits) -> Ending | None:
    """Wait for the tree to end; why it has to be ended, if it has."""
    begun = active = time.monotonic()
    spent = 0.0
    while True:
        try:
            process.wait(_POLL_SECONDS)
            return None
        except subprocess.TimeoutExpired:
            pass
        seconds, memory, wants = _use(process.pid)
        now = time.monotonic()
        if wants or seconds > spent + 0.01:
            active, spent = now, seconds
        if seconds > limits.seconds:
            return Ending.SECONDS
        if memory > limits.memory:
            return Ending.MEMORY
        if now - active > _IDLE_SECONDS or now - begun > _LONGEST_WAIT * limits.seconds:
            return Ending.IDLE


def _end(process: "subprocess.Popen[bytes]") -> None:
    """The namespace's first process takes all others with it; `unshare` does not wait for what it did not see end."""
    try:
        for first in psutil.Process(process.pid).children():
            first.kill()
    except psutil.NoSuchProcess:
        pass
    process.kill()
    process.wait()


def _use(pid: int) -> tuple[float, int, bool]:
    """Processor seconds and bytes of a tree, and whether any of it waits for a processor."""
    seconds, memory, wants = 0.0, 0, False
    try:
        tree = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return seconds, memory, wants
    for one in tree:
        try:
            with one.oneshot():
                times = one.cpu_times()
                seconds += times.user + times.system + times.children_user + times.children_system
                memory += one.memory_info().rss
                wants = wants or one.status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
        except psutil.NoSuchProcess:
            continue
    return seconds, memory, wants


def _refused(reason: str) -> BadInput:
    return BadInput(
        f"pass@1 executes completions, which needs a sandbox that cannot be had here ({reason}); take a Linux machine "
        "that lets users make namespaces, or leave the metric out."
    )
