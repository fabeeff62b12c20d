"""Completions that mean harm, and how each may end: docs/benchmarks.md has the same list."""

from dataclasses import dataclass

from workers.execution.sandbox import Ending


@dataclass(frozen=True)
class Hostile:
    """A program, and the endings that say that it was contained."""

    program: str
    endings: frozenset[Ending]


def _hostile(program: str, *endings: Ending) -> Hostile:
    return Hostile(program, frozenset(endings or (Ending.FAILED,)))


#: by what each does
HOSTILE = {
    "forks without end": _hostile(
        "import os\nwhile True:\n    os.fork()", Ending.FAILED, Ending.SECONDS, Ending.MEMORY
    ),
    "starts a thousand threads": _hostile(
        "import threading, time\nfor _ in range(1000):\n    threading.Thread(target=time.sleep, args=(9,)).start()",
        Ending.FAILED,
        Ending.IDLE,
    ),
    "takes all memory": _hostile(
        "x = []\nwhile True:\n    x.append(bytearray(10_000_000))", Ending.FAILED, Ending.MEMORY
    ),
    "takes memory in many processes": _hostile(
        "import os, time\nfor _ in range(4):\n    os.fork()\nx = bytearray(50_000_000)\ntime.sleep(5)",
        Ending.FAILED,
        Ending.MEMORY,
    ),
    "keeps memory in files without a name": _hostile(
        "import os\nkept = []\nfor _ in range(20):\n    kept.append(os.memfd_create('x'))\n"
        "    os.write(kept[-1], bytes(15 * 2**20))"
    ),
    "keeps memory in segments that nothing maps": _hostile(
        "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.shmat.restype = ctypes.c_void_p\n"
        "libc.shmdt.argtypes = [ctypes.c_void_p]\nfor _ in range(20):\n    kept = libc.shmget(0, 15 * 2**20, 0o1600)\n"
        "    assert kept >= 0\n    at = libc.shmat(kept, None, 0)\n    ctypes.memset(at, 1, 15 * 2**20)\n"
        "    libc.shmdt(at)"
    ),
    "leaves keys with the kernel": _hostile(
        "import ctypes, platform\nnumber = {'x86_64': 248, 'aarch64': 217}[platform.machine()]\n"
        "assert ctypes.CDLL(None).syscall(number, b'user', b'x', b'y' * 100, 100, -3) >= 0"
    ),
    "loops without end": _hostile("while True:\n    pass", Ending.FAILED, Ending.SECONDS),
    "loops without end and ignores all signals": _hostile(
        "import signal\nfor number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
        "    signal.signal(number, signal.SIG_IGN)\nwhile True:\n    pass",
        Ending.FAILED,
        Ending.SECONDS,
    ),
    "waits for ever": _hostile("import time\ntime.sleep(1000)", Ending.IDLE),
    "stops itself": _hostile("import os\nos.kill(os.getpid(), 19)", Ending.IDLE),
    "kills its parent and everybody else": _hostile(
        "import os, signal\nfor pid in (os.getppid(), 0, -1):\n    os.kill(pid, signal.SIGKILL)"
    ),
    "leaves a process behind": _hostile(
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(1000)\n"
        "    os._exit(0)\nos.wait()\nraise SystemExit"
    ),
    "writes outside its folder": _hostile(
        "import os\nfor folder in ('/usr', '/usr/lib', '/etc', os.path.dirname(os.__file__)):\n    try:\n"
        "        open(folder + '/shortstop-was-here', 'w')\n    except OSError:\n        pass\n    else:\n"
        "        break\nelse:\n    raise AssertionError('contained')"
    ),
    "fills the disk": _hostile("with open('x', 'wb') as f:\n    while True:\n        f.write(bytes(2**20))"),
    "fills the disk with many files": _hostile(
        "import itertools\nfor i in itertools.count():\n"
        "    with open(str(i), 'wb') as f:\n        f.write(bytes(2**20))"
    ),
    "makes files without number": _hostile("for i in range(20_000):\n    open(str(i), 'w').close()"),
    "opens files without number": _hostile("x = [open('/dev/null') for _ in range(100)]"),
    "writes without end to its output": _hostile(
        "import sys\nwhile True:\n    sys.stdout.write('x' * 2**20)", Ending.FAILED, Ending.SECONDS
    ),
    "reads the environment": _hostile(
        "import os\nnames = set(os.environ) - {'PYTHONHASHSEED', 'LC_CTYPE'}\n"
        "assert names or os.path.exists('/proc/1/environ')"
    ),
    "looks into the process that started it": _hostile(
        "import ctypes, os, platform\nlibc, to = ctypes.CDLL(None), (ctypes.c_char * 8)()\n"
        "here = (ctypes.c_ulong * 2)(ctypes.addressof(to), 8)\n"
        "number = {'x86_64': 310, 'aarch64': 270}[platform.machine()]\n"
        "mine = libc.syscall(number, os.getpid(), here, 1, here, 1, 0)\n"
        "assert mine >= 0 or libc.ptrace(16, os.getppid(), None, None) == 0"
    ),
    "reads other people's files": _hostile("open('/etc/passwd').read()"),
    "calls somebody": _hostile("import socket\nsocket.create_connection(('127.0.0.1', 80), 2)"),
    "asks a name server": _hostile("import socket\nsocket.getaddrinfo('example.org', 80)"),
    "makes a root of its own": _hostile("import os\nos.chroot('.')"),
    "mounts, or makes namespaces": _hostile(
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "assert libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0 or libc.unshare(0x10000000) == 0"
    ),
}
