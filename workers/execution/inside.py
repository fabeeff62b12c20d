"""Inside the sandbox's namespaces: build a root of its own, give all privileges up, run the program, say how it ended.

Runs as a script, as process 1 of the namespace, with nothing but the standard library. It has `unshare`'s new user,
mount, network, process, IPC and host-name namespaces around it; what it makes ends with it.
"""

import ctypes
import json
import os
import resource
import select
import signal
import struct
import sys
import threading

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
#: flags of `statvfs` that a remount must repeat, and what they are called in `mount`
KEPT = {1: 1, 2: 2, 4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
CAPABILITIES_VERSION = 0x20080522
#: system calls that hold memory, or have the kernel work, where no process is seen to, and those that look into other
#: processes: by machine the code that seccomp tells it by, and their numbers
REFUSED = {
    "x86_64": (
        0xC000003E,
        {"shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240, "add_key": 248, "request_key": 249, "keyctl": 250}
        | {"ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311}
        | {"memfd_create": 319, "bpf": 321, "userfaultfd": 323, "io_uring_setup": 425, "memfd_secret": 447},
    ),
    "aarch64": (
        0xC00000B7,
        {"shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180, "add_key": 217, "request_key": 218, "keyctl": 219}
        | {"ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271}
        | {"memfd_create": 279, "bpf": 280, "userfaultfd": 282, "io_uring_setup": 425, "memfd_secret": 447},
    ),
}
#: of seccomp's programs: load a word of the call, jump where it equals, jump where it is no less, answer
LOAD, IF_EQUAL, IF_NO_LESS, ANSWER = 0x20, 0x15, 0x35, 0x06
NUMBER_AT, MACHINE_AT = 0, 4
ALLOW, NOT_PERMITTED, KILL = 0x7FFF0000, 0x00050001, 0x80000000
#: from here on x86's numbers are those of another table
OTHER_TABLE = 0x40000000
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


def build_root(root: str, paths: list[str], size: int, inodes: int, user: int | None, program: bytes) -> None:
    """A root in memory with what Python needs and a folder to work in, and go there. inodes: files and folders."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},nr_inodes={inodes},mode=0755")
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


def refuse_calls() -> None:
    """No process here makes the calls of `REFUSED`, nor any of another machine's table; they fail as not permitted.

    Raises `OSError` where the machine's numbers are not known.
    """
    machine = os.uname().machine
    if machine not in REFUSED:
        raise OSError(f"the system calls of {machine} are not known here")
    code, calls = REFUSED[machine]
    numbers = sorted(calls.values())
    # behind the tests stand two answers: allowed, and what each test that holds jumps to
    tests = [(IF_EQUAL, len(numbers) + 1 - place, 0, number) for place, number in enumerate(numbers)]
    program = [
        (LOAD, 0, 0, MACHINE_AT),
        (IF_EQUAL, 1, 0, code),
        (ANSWER, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER_AT),
        *tests,
        (IF_NO_LESS, 1, 0, OTHER_TABLE),
        (ANSWER, 0, 0, ALLOW),
        (ANSWER, 0, 0, NOT_PERMITTED),
    ]
    packed = b"".join(struct.pack("HBBI", *line) for line in program)
    kept = ctypes.create_string_buffer(packed, len(packed))
    header = struct.pack("HP", len(program), ctypes.addressof(kept))
    filtering = 2
    checked(libc.prctl(PR_SET_SECCOMP, filtering, header, 0, 0), "seccomp")


def set_limits(limits: dict[str, int]) -> None:
    """Of each process; the namespaces' processes together are counted outside."""
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))


def end_with_reader(channel: int) -> None:
    """End, and all here with it, when nobody can hear of it any more: whoever was to end us is dead."""
    closed = select.poll()
    closed.register(channel, 0)
    closed.poll()
    os._exit(1)


def run(python: str, channel: int) -> int:
    """The program's exit status; all that it started ends when this process does."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.set_inheritable(channel, True)
        # the order of sets must not decide whether a completion passes
        os.execve(python, [python, "-s", "-S", "-P", "-B", "-c", RUNNER, str(channel)], {"PYTHONHASHSEED": "0"})
    threading.Thread(target=end_with_reader, args=(channel,), daemon=True).start()
    while True:
        pid, status = os.wait()
        if pid == child:
            return status


def main() -> None:
    """Read the program from standard input; say `ready`, and behind it `passed` where it ran to its end."""
    asked = json.loads(sys.argv[1])
    channel = asked["channel"]
    program = sys.stdin.buffer.read()
    build_root(asked["root"], asked["paths"], asked["size"], asked["inodes"], asked["user"], program)
    nothing = os.open("/dev/null", os.O_RDWR)
    set_limits(asked["limits"])
    give_up_privileges(asked["user"])
    refuse_calls()
    os.write(channel, b"ready")
    for stream in range(3):
        os.dup2(nothing, stream)
    run(asked["python"], channel)


if __name__ == "__main__":
    main()
