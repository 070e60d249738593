"""Runs a Python program that nobody trusts: limited in time and memory, without network, and gone when it is over.

On Linux it has namespaces of its own for users, processes, mounts, IPC and network: it sees no interface, not even
loopback; it can signal nobody; every file is read-only but those of an empty folder in memory; and when the first
process of its namespace is killed, the kernel kills all the others. Where namespaces are not allowed, in most
containers, a seccomp filter still refuses sockets. `probe` says which of these hold.

The process that calls `run` must have one thread and no other children: it adopts what the program leaves behind
(PR_SET_CHILD_SUBREAPER) and kills all of it. If it dies itself, so do they (PR_SET_PDEATHSIG). Times are in seconds,
sizes in MB (2^20 bytes).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
from typing import NamedTuple, NoReturn

PROCESSES = 64  # at a time, threads included where the kernel counts them
FILES_MB = 64  # of all files that it writes
OUTPUT_MB = 8
_LOOK_S = 0.02  # how often its processes are counted
_TAIL = 2000  # bytes of stderr that are kept

_NAMESPACES = 0x10000000 | 0x20000 | 0x20000000 | 0x40000000 | 0x8000000 | 0x4000000  # user, mount, pid, net, ipc, uts
_SET_PDEATHSIG, _SET_SECCOMP, _SET_SUBREAPER, _SET_NO_NEW_PRIVS = 1, 22, 36, 38
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _RDONLY, _PRIVATE = 442, -100, 0x8000, 1, 1 << 18
_NOSUID_NODEV = 2 | 4
_UID = 1000  # inside
# Audit architecture, and the numbers of socket and io_uring_setup.
_ARCHITECTURES = {"x86_64": (0xC000003E, 41, 425), "aarch64": (0xC00000B7, 198, 425)}


class Isolation(NamedTuple):
    """What a program is kept from: other `processes`, changing `files`, and the network, by `namespace` or `filter`."""

    processes: bool = False
    files: bool = False
    namespace: bool = False
    filter: bool = False

    @property
    def network(self) -> bool:
        return self.namespace or self.filter

    @property
    def missing(self) -> list[str]:
        """What is promised and does not hold here."""
        held = {"network": self.network, "files": self.files, "processes": self.processes}
        return [name for name, holds in held.items() if not holds]


class Limits(NamedTuple):
    """For one program with all its processes."""

    seconds: float
    memory_mb: int


class Outcome(NamedTuple):
    """How a program ended: `exited`, or stopped for its `timeout`, `memory`, `processes` or `output`."""

    how: str
    code: int
    stdout: bytes
    stderr: bytes
    seconds: float


def probe(scratch: str) -> Isolation:
    """What holds on this machine, found out by trying it. `scratch`: a folder to try it in."""
    if not sys.platform.startswith("linux"):
        return Isolation()
    full = Isolation(processes=True, files=True, namespace=True, filter=platform.machine() in _ARCHITECTURES)
    for wanted in (full, full._replace(files=False), Isolation(filter=full.filter)):
        if wanted != Isolation() and run("pass", b"", Limits(20, 256), wanted, scratch).code == 0:
            return wanted
    return Isolation()


def adopt() -> None:
    """Become the parent of all that descendants leave behind, so that it can be found and killed."""
    if sys.platform.startswith("linux"):
        _call("prctl", _SET_SUBREAPER, 1, 0, 0, 0)


def run(source: str, stdin: bytes, limits: Limits, isolation: Isolation, scratch: str, alive: int = -1) -> Outcome:
    """Run Python source in an empty folder below `scratch`. When this returns, nothing of it runs any more.

    `alive`: a descriptor; when its other side is closed, the program is killed and this process ends.
    """
    adopt()
    folder = tempfile.mkdtemp(dir=scratch)
    with tempfile.TemporaryFile(dir=scratch) as given, contextlib.ExitStack() as stack:
        given.write(stdin)
        given.seek(0)
        pipes = [os.pipe(), os.pipe()]
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            _first(parent, source, given.fileno(), pipes[0][1], pipes[1][1], limits, isolation, folder)
        for ours, theirs in pipes:
            os.close(theirs)
            stack.callback(os.close, ours)
        try:
            return _watched(child, pipes[0][0], pipes[1][0], limits, alive)
        finally:
            _kill_all(child)
            shutil.rmtree(folder, ignore_errors=True)


def _watched(child: int, stdout: int, stderr: int, limits: Limits, alive: int) -> Outcome:
    started = time.monotonic()
    got = {stdout: bytearray(), stderr: bytearray()}
    poll = select.poll()
    for fd in got:
        poll.register(fd, select.POLLIN)
    if alive >= 0:
        poll.register(alive, 0)  # tells of a hang-up unasked
    status = None

    def outcome(how: str, code: int = -1) -> Outcome:
        return Outcome(how, code, out, err, time.monotonic() - started)

    while True:
        for fd, event in poll.poll(_LOOK_S * 1000):
            if fd == alive:
                _kill_all(child)
                os._exit(0)
            data = os.read(fd, 1 << 16) if event & select.POLLIN else b""
            got[fd] += data
            if not data:
                poll.unregister(fd)
        out, err = bytes(got[stdout]), bytes(got[stderr][-_TAIL:])
        del got[stderr][:-_TAIL]
        if status is not None:
            how = "timeout" if status in (128 + signal.SIGXCPU, 128 + signal.SIGKILL) else "exited"
            return outcome("memory" if b"MemoryError" in err and status else how, status)
        if len(out) > OUTPUT_MB << 20:
            return outcome("output")
        if time.monotonic() - started > limits.seconds:
            return outcome("timeout")
        family = _descendants(child)
        if len(family) > PROCESSES:
            return outcome("processes")
        if sum(map(_resident, family)) > limits.memory_mb << 20:
            return outcome("memory")
        ended, value = os.waitpid(child, os.WNOHANG)
        if ended:  # once more around, for what is left in the pipes
            status = _code(value)


def _code(status: int) -> int:
    """An exit code as shells count: 128 and the signal for a death by signal."""
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


# --- inside -----------------------------------------------------------------------------------------------------


def _first(
    parent: int, source: str, stdin: int, stdout: int, stderr: int, limits: Limits, isolation: Isolation, folder: str
) -> NoReturn:
    """The forked child: enters its namespaces, has the program run by a process in them, and ends as that does."""
    try:
        os.setsid()
        _die_with(parent)
        if isolation.namespace:
            uid, gid = os.geteuid(), os.getegid()
            _call("unshare", _NAMESPACES)
            for name, value in (("setgroups", "deny"), ("uid_map", f"{_UID} {uid} 1"), ("gid_map", f"{_UID} {gid} 1")):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(value)
            outside, held = os.pipe()
            second = os.fork()
            if second:
                os._exit(_code(os.waitpid(second, 0)[1]))
            # The first process of the namespace: all others end with it. Its parent is outside, without a number here:
            # that it lives is told by the pipe of which it alone holds the other end.
            os.close(held)
            _call("prctl", _SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if select.select([outside], [], [], 0)[0]:
                os._exit(97)
        if isolation.files:
            _read_only(folder)
        os.chdir(folder)
        with open("main.py", "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(source)
        me = os.getpid()
        program = os.fork()
        if program == 0:
            _die_with(me)
            _become(stdin, stdout, stderr, limits, isolation, folder)
        while True:
            pid, status = os.wait()
            if pid == program:
                os._exit(_code(status))
    except BaseException as error:  # noqa: BLE001 - a forked child must never return into its parent's code
        os.write(stderr, f"sandbox: {type(error).__name__}: {error}".encode())
        os._exit(97)


def _die_with(parent: int) -> None:
    if sys.platform.startswith("linux"):
        _call("prctl", _SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(97)


def _read_only(folder: str) -> None:
    """Make every mount read-only, with a small file system in memory on the folder and a fresh /proc."""
    attributes = struct.pack("QQQQ", _RDONLY, 0, _PRIVATE, 0)
    _call("syscall", _MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, len(attributes))
    size = f"size={FILES_MB}m,mode=700".encode()
    _call("mount", b"tmpfs", folder.encode(), b"tmpfs", _NOSUID_NODEV, size)
    with contextlib.suppress(OSError):  # containers that hide parts of /proc do not allow it
        _call("mount", b"proc", b"/proc", b"proc", _NOSUID_NODEV, None)


def _become(stdin: int, stdout: int, stderr: int, limits: Limits, isolation: Isolation, folder: str) -> NoReturn:
    """Turn into the program, with nothing but its three standard descriptors and a few variables."""
    for target, source in enumerate((stdin, stdout, stderr)):
        os.dup2(source, target)
    os.closerange(3, 4096)
    memory, files = limits.memory_mb << 20, FILES_MB << 20
    seconds = math.ceil(limits.seconds)
    bounds = {
        resource.RLIMIT_AS: (memory, memory), resource.RLIMIT_CPU: (seconds, seconds + 1),
        resource.RLIMIT_FSIZE: (files, files), resource.RLIMIT_CORE: (0, 0), resource.RLIMIT_NOFILE: (256, 256),
        resource.RLIMIT_NPROC: (_tasks() + PROCESSES,) * 2,
    }  # fmt: skip
    for kind, bound in bounds.items():
        with contextlib.suppress(ValueError, OSError):  # a bound that is lower already stays
            resource.setrlimit(kind, bound)
    if sys.platform.startswith("linux"):
        _call("prctl", _SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if isolation.filter:
        _refuse_sockets()
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    places = dict.fromkeys(("HOME", "TMPDIR"), folder)
    variables = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", **single, **places}
    os.execve(sys.executable, [sys.executable, "-s", "-P", "-B", "main.py"], variables)


def _tasks() -> int:
    """How many processes and threads this user has: kernels before 5.14 count them all, whatever the namespace."""
    with contextlib.suppress(OSError):
        mine = [e.path for e in os.scandir("/proc") if e.name.isdecimal() and e.stat().st_uid == os.getuid()]
        return sum(len(_names(f"{path}/task")) for path in mine)
    return 1024


def _refuse_sockets() -> None:
    """A seccomp filter: socket and io_uring_setup fail with EPERM, system calls of other architectures kill."""
    arch, sock, ring = _ARCHITECTURES[platform.machine()]
    refuse, allow, kill = 0x00050001, 0x7FFF0000, 0x80000000
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    steps = [
        (load, 0, 0, 4), (equal, 1, 0, arch), (give, 0, 0, kill),
        (load, 0, 0, 0), (at_least, 3, 0, 0x40000000), (equal, 2, 0, sock), (equal, 1, 0, ring),
        (give, 0, 0, allow), (give, 0, 0, refuse),
    ]  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
    _call("prctl", _SET_SECCOMP, 2, ctypes.c_char_p(program), 0, 0)


def _call(name: str, *arguments: object) -> None:
    """A function of the C library. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    made = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    if getattr(libc, name)(*made) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


# --- what is left -----------------------------------------------------------------------------------------------


def _kill_all(child: int) -> None:
    """Kill the child's group and every descendant of this process, adopted ones included, until there is none."""
    while True:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        for pid in _descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.001)
        except ChildProcessError:
            return


def _descendants(parent: int) -> list[int]:
    """Processes below one, as the kernel lists them; none where it does not."""
    found: list[int] = []
    pending = [parent]
    while pending:
        pid = pending.pop()
        for task in _names(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children") as file:
                below = [int(word) for word in file.read().split()]
                found += below
                pending += below
        if len(found) > 4 * PROCESSES:  # enough to know; the next look finds the others
            break
    return found


def _names(folder: str) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(folder)
    return []


def _resident(pid: int) -> int:
    """Bytes of memory that a process occupies."""
    with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
    return 0
