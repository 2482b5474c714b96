"""The inside of a limited process: `python -I jail.py FROM TO PARENT`. It imports nothing but the standard library.

In this order: limits of the kernel on time, memory, files and processes (setrlimit); files that it may write
(landlock); a network namespace with nothing in it, where the system gives one; and a filter of system calls (seccomp)
that lets the process make no socket, start no process or program, signal, trace or read no other one, and change no
file by its name. A thread is allowed. What could not be shut is missing from what is reported. Then the program runs as
`__main__`.

The filter is classic BPF over struct seccomp_data: number of the call at byte 0, architecture at 4, arguments from 16.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import runpy
import signal
import struct
import sys
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 38, 22, 2
CLONE_NEWUSER, CLONE_NEWNET, CLONE_THREAD = 0x10000000, 0x40000000, 0x00010000
LOAD, JUMP_EQUAL, JUMP_ANY_BIT, JUMP_AT_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
EPERM, ENOSYS = 1, 38
X32 = 0x40000000
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
REFUSED = {
    # socket, connect, bind, listen, accept, accept4; fork, vfork, execve, execveat; kill, tkill, tgkill,
    # rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_open, pidfd_send_signal, pidfd_getfd; ptrace, process_vm_readv and
    # _writev, kcmp; io_uring_setup, _enter, _register; unshare, setns, mount, umount2, pivot_root, chroot, bpf,
    # perf_event_open, userfaultfd, keyctl, add_key, request_key, prlimit64, setpgid, setsid, setpriority; truncate,
    # chmod, fchmod, chown, fchown, lchown, fchownat, fchmodat, fchmodat2: landlock does not look at these
    "x86_64": (
        *(41, 42, 49, 50, 43, 288),
        *(57, 58, 59, 322),
        *(62, 200, 234, 129, 297, 434, 424, 438),
        *(101, 310, 311, 312, 425, 426, 427, 272, 308, 165, 166, 155, 161, 321, 298, 323, 250, 248, 249, 302),
        *(109, 112, 141),
        *(76, 90, 91, 92, 93, 94, 260, 268, 452),
    ),
    "aarch64": (
        *(198, 203, 200, 201, 202, 242),
        *(221, 281),
        *(129, 130, 131, 138, 240, 434, 424, 438),
        *(117, 270, 271, 272, 425, 426, 427, 97, 268, 40, 39, 41, 51, 280, 241, 282, 219, 217, 218, 261),
        *(154, 157, 140),
        *(45, 52, 53, 54, 55, 452),
    ),
}
# Landlock's first version: all that writes, makes or removes; the numbers of its three calls are the same everywhere.
MAY_WRITE = 1 << 1 | sum(1 << bit for bit in range(4, 13))
CREATE_RULESET, ADD_RULE, RESTRICT_SELF, PATH_BENEATH = 444, 445, 446, 1
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE3 = 435


def main() -> None:
    """Read what to do, shut the process in, run the program, and say how it ended."""
    source, target, parent = (int(text) for text in sys.argv[1:4])
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    with os.fdopen(source, "rb") as pipe:
        told = json.load(pipe)
    program, word = told.pop("program"), told.pop("word")
    path = Path("program.py").resolve()
    path.write_text(program, encoding="utf-8")
    _limit(told)
    held = _shut_in(libc)
    if "processes" not in held:
        # Second best: it counts threads too, and does not bind root.
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    os.write(target, ",".join(sorted(held)).encode())
    sys.argv[:] = [str(path)]
    end = "failed"
    try:
        runpy.run_path(str(path), run_name="__main__")
        end = "end"
    except SystemExit as leaving:
        if leaving.code in (None, 0):
            end = "left"
        raise
    finally:
        sys.stdout.flush()
        os.write(target, f" {word}/{end}".encode())


def _limit(told: dict[str, int]) -> None:
    limits = {
        resource.RLIMIT_CPU: told["cpu_s"],
        resource.RLIMIT_AS: told["memory_bytes"],
        resource.RLIMIT_FSIZE: told["file_bytes"],
        resource.RLIMIT_NOFILE: told["open_files"],
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))
    # Writing more than a file may hold is an error of that write, not the end of the process.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def _shut_in(libc: ctypes.CDLL) -> set[str]:
    """What is shut now: `files`, `network`, `processes`."""
    if sys.platform != "linux":
        return set()
    held = {"network"} if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0 else set()
    machine = platform.machine()
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return held
    held |= {"files"} if _only_writes_here(libc) else set()
    if machine not in ARCHITECTURES:
        return held
    code = b"".join(_filter(machine))
    kept = ctypes.create_string_buffer(code, len(code))
    head = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(kept))
    program = ctypes.create_string_buffer(head, len(head))
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0) == 0:
        held |= {"network", "processes"}
    return held


def _only_writes_here(libc: ctypes.CDLL) -> bool:
    """Let the process write into its own folder and nowhere else; False: this kernel cannot."""
    rights = ctypes.create_string_buffer(struct.pack("Q", MAY_WRITE), 8)
    ruleset = libc.syscall(CREATE_RULESET, rights, ctypes.c_size_t(8), 0)
    if ruleset < 0:
        return False
    folder = os.open(".", os.O_PATH)
    beneath = ctypes.create_string_buffer(struct.pack("=Qi", MAY_WRITE, folder), 12)
    added = int(libc.syscall(ADD_RULE, ruleset, PATH_BENEATH, beneath, 0)) == 0
    held = added and int(libc.syscall(RESTRICT_SELF, ruleset, 0)) == 0
    os.close(folder)
    os.close(ruleset)
    return held


def _filter(machine: str) -> list[bytes]:
    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    made = [step(LOAD, 4), step(JUMP_EQUAL, ARCHITECTURES[machine], 1, 0), step(RETURN, KILL), step(LOAD, 0)]
    if machine == "x86_64":
        # Calls of the x32 interface have numbers of their own.
        made += [step(JUMP_AT_LEAST, X32, 0, 1), step(RETURN, KILL)]
    for number in REFUSED[machine]:
        made += [step(JUMP_EQUAL, number, 0, 1), step(RETURN, ERRNO | EPERM)]
    # The C library falls back to clone, whose flags can be looked at.
    made += [step(JUMP_EQUAL, CLONE3, 0, 1), step(RETURN, ERRNO | ENOSYS)]
    made += [step(JUMP_EQUAL, CLONE[machine], 0, 3), step(LOAD, 16), step(JUMP_ANY_BIT, CLONE_THREAD, 1, 0)]
    return [*made, step(RETURN, ERRNO | EPERM), step(RETURN, ALLOW)]


if __name__ == "__main__":
    main()
