"""The parent of one engine: hands SIGTERM on, ends as the engine ends, and leaves no process behind that the engine started, however it hid.

Executed by path with the standard library alone: `python guardian.py PARENT-PID PROGRAM ARGUMENT…`. Orphans come to it (subreaper, prctl(2)): a
child that left the process group or cleared its environment is found too. SIGUSR1 ends everything at once and then this process by the same signal,
which tells it from an engine that somebody else killed; the death of the parent ends everything too.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from contextlib import suppress

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCHLD)
SWEEP_S = 5.0  # a process that the kernel does not let go (a hung driver) must not hold us for ever
CANNOT = "the engine's program cannot be executed"


def children() -> list[int]:
    """The process ids whose parent is this process."""
    found, own = [], os.getpid()
    for name in os.listdir("/proc"):  # noqa: PTH208 - started for every engine: it imports as little as it can
        if name.isdigit():
            with suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat", "rb") as stat:  # noqa: PTH123
                if int(stat.read().rsplit(b")", 1)[1].split()[1]) == own:
                    found.append(int(name))
    return found


def sweep() -> None:
    """Kills what is left; a killed process's children come to us and are next."""
    end = time.monotonic() + SWEEP_S
    while time.monotonic() < end:
        for pid in children():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def start(argv: list[str]) -> int:
    """Forks and executes the engine; its process id."""
    libc = ctypes.CDLL(None)
    pid = os.fork()
    if pid:
        return pid
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    for number in (signal.SIGINT, signal.SIGQUIT):  # a shell's `&` has them ignored, and an engine's parts end each other by them
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execv(argv[0], argv)  # noqa: S606 - the adapter's argument vector, no shell
    except OSError as error:
        os.write(2, f"{CANNOT}: {argv[0]}: {error.strerror}\n".encode())
    os._exit(127)


def ended(engine: int) -> int | None:
    """Takes the dead children; the engine's wait status when it is among them."""
    status = None
    with suppress(ChildProcessError):
        while True:
            pid, found = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            status = found if pid == engine else status
    return status


def main(parent: int, argv: list[str]) -> int:
    """Watches until the engine's end and dies of what it died of; returns its status otherwise."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    if os.getppid() != parent:
        return 1
    engine = start(argv)
    status = None
    while status is None:
        got = signal.sigwaitinfo(SIGNALS).si_signo
        if got == signal.SIGCHLD:
            status = ended(engine)
        elif got == signal.SIGUSR1 or os.getppid() != parent:
            status = signal.SIGUSR1
        else:
            os.kill(engine, signal.SIGTERM)
    sweep()
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        os.kill(os.getpid(), number)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
