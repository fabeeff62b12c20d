"""Inside the sandbox's namespaces: build a root of its own, give all privileges up, run the program, say how it ended.

Runs as a script, as process 1 of the namespace, with nothing but the standard library. It has `unshare`'s new user,
mount, network, process, IPC and host-name namespaces around it; what it makes ends with it.
"""

import ctypes
import json
import os
import resource
import signal
import sys

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
#: flags of `statvfs` that a remount must repeat, and what they are called in `mount`
KEPT = {1: 1, 2: 2, 4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
CAPABILITIES_VERSION = 0x20080522
#: what the sandbox has of /dev
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
RUNNER = """
import os, sys
with open('/program.py', encoding='utf-8') as file:
    source = file.read()
exec(compile(source, 'program.py', 'exec'), {'__name__': '__main__'})
os.write(int(sys.argv[1]), b'passed')
"""

libc = ctypes.CDLL(None, use_errno=True)


def checked(answer: int, what: str) -> None:
    """Raises `OSError` where a call of the C library failed."""
    if answer:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """As mount(2). Raises `OSError`."""
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    checked(libc.mount(*texts, ctypes.c_ulong(flags), None if options is None else options.encode()), f"mount {target}")


def show(path: str, root: str) -> None:
    """Let a file or folder be seen in the new root, read-only; a link is made again."""
    target = root + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        with open(target, "wb"):
            pass
    mount(path, target, None, MS_BIND)
    kept = sum(flag for seen, flag in KEPT.items() if os.statvfs(target).f_flag & seen)
    mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | kept)


def build_root(root: str, paths: list[str], size: int, user: int | None, program: bytes) -> None:
    """A root in memory with what Python needs and a folder to work in, and go there."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},mode=0755")
    for path in [*paths, *DEVICES]:
        show(path, root)
    for folder in ("work", "tmp"):
        os.makedirs(f"{root}/{folder}", exist_ok=True)
        if user is not None:
            os.chown(f"{root}/{folder}", user, user)
    with open(f"{root}/program.py", "wb") as file:
        file.write(program)
    os.chroot(root)
    os.chdir("/work")


def give_up_privileges(user: int | None) -> None:
    """No capability now, none by executing anything. user: to become, where we are root."""
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
    for capability in range(64):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
            break
    if user is not None:
        os.setresuid(user, user, user)
    # another user's process forgets that it was to end with its parent
    checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "death signal")
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_VERSION, 0)
    checked(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def set_limits(limits: dict[str, int]) -> None:
    """Of each process; the namespaces' processes together are counted outside."""
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))


def run(python: str, channel: int) -> int:
    """The program's exit status; all that it started ends when this process does."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.set_inheritable(channel, True)
        # the order of sets must not decide whether a completion passes
        os.execve(python, [python, "-s", "-S", "-P", "-B", "-c", RUNNER, str(channel)], {"PYTHONHASHSEED": "0"})
    while True:
        pid, status = os.wait()
        if pid == child:
            return status


def main() -> None:
    """Read the program from standard input; say `ready`, and behind it `passed` where it ran to its end."""
    asked = json.loads(sys.argv[1])
    channel = asked["channel"]
    program = sys.stdin.buffer.read()
    build_root(asked["root"], asked["paths"], asked["size"], asked["user"], program)
    nothing = os.open("/dev/null", os.O_RDWR)
    set_limits(asked["limits"])
    give_up_privileges(asked["user"])
    os.write(channel, b"ready")
    for stream in range(3):
        os.dup2(nothing, stream)
    run(asked["python"], channel)


if __name__ == "__main__":
    main()
