"""The process between a run and its server: whoever dies, no server is left behind. Standard library only.

    python guard.py PID PROGRAM ARGUMENT ...

It leads a session and process group of its own, in which the server starts its workers. When the run (process PID) is
gone, killed or not, when it is told to end (SIGTERM), or when the server itself has ended, it ends the whole group. Its
exit code is the server's. A guard that is killed takes the server with it, where the system has PR_SET_PDEATHSIG.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LOOK_EVERY_S, GRACE_S = 0.25, 10.0


def prctl(option: int, value: int) -> None:
    """Ask Linux; other systems have no such call, and do without."""
    try:
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
    except (OSError, AttributeError):
        return


def main() -> None:
    run, command = int(sys.argv[1]), sys.argv[2:]
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Workers whose parent died become children of the guard, so that it can wait for them.
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    server = subprocess.Popen(command, preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM))
    while server.poll() is None and not told and os.getppid() == run:
        time.sleep(LOOK_EVERY_S)
    end_group(server)
    sys.exit(server.returncode if server.returncode is not None else 1)


def end_group(server: subprocess.Popen[bytes]) -> None:
    """End every process of the group but this one: first asked, then killed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    limit = time.monotonic() + GRACE_S
    while server.poll() is None and time.monotonic() < limit:
        time.sleep(LOOK_EVERY_S / 5)
    while others() and time.monotonic() < limit:
        time.sleep(LOOK_EVERY_S / 5)
    if server.poll() is None or others():
        os.killpg(0, signal.SIGKILL)


def others() -> bool:
    """Whether children are left; those that ended are forgotten."""
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        return False
    return True


if __name__ == "__main__":
    main()
