"""Running one program in a limited process, from the outside: start, feed, wait, judge, clean up.

The process is Python with `jail.py`: it takes its limits, shuts itself in, and then runs the program. It says that the
program came to its end by writing back a word that it was told in secret: `sys.exit(0)` before the tests is no success.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

JAIL = Path(__file__).with_name("jail.py")
MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What one program may use: seconds on the clock and of the processor, bytes, and numbers."""

    wall_s: float = 4.0
    cpu_s: int = 4
    memory_bytes: int = 512 * MIB
    file_bytes: int = 4 * MIB
    open_files: int = 64


@dataclass(frozen=True)
class Verdict:
    """What became of a program.

    Attributes:
        ended: it ran to its last line.
        left: it ended by `sys.exit` with 0, or with nothing.
        printed: what it wrote to standard output; `complaint`: the end of what it wrote to standard error.
        held: what could be shut: `files` (it writes into its own folder alone), `network`, `processes`.
    """

    ended: bool
    left: bool
    printed: str
    complaint: str
    held: frozenset[str]

    @property
    def ended_or_left(self) -> bool:
        return self.ended or self.left


def run_program(program: str, given: str, limits: Limits) -> Verdict:
    """Run a program with `given` on its standard input."""
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="pegbox-code-", ignore_cleanup_errors=True) as folder:
        inside = Path(folder, "work")
        inside.mkdir()
        paths = {name: Path(folder, name) for name in ("given", "printed", "complaint")}
        paths["given"].write_text(given, encoding="utf-8")
        told = json.dumps({"program": program, "word": word, **asdict(limits)}).encode()
        with (
            paths["given"].open("rb") as stdin,
            paths["printed"].open("wb") as stdout,
            paths["complaint"].open("wb") as stderr,
        ):
            answer = _run(told, inside, stdin.fileno(), stdout.fileno(), stderr.fileno(), limits.wall_s)
        said = answer.split(" ")
        held = frozenset(said[0].split(",")) - {""} if said[0] else frozenset()
        end = said[1] if len(said) > 1 else ""
        printed, complaint = (_read(paths[name], limits.file_bytes) for name in ("printed", "complaint"))
    return Verdict(end == f"{word}/end", end == f"{word}/left", printed, complaint[-2000:], held)


def _run(told: bytes, inside: Path, stdin: int, stdout: int, stderr: int, wall_s: float) -> str:
    """What the process says of itself over a pipe of its own."""
    to_read, to_write = os.pipe()
    back_read, back_write = os.pipe()
    command = [sys.executable, "-I", "-X", "utf8", str(JAIL), str(to_read), str(back_write), str(os.getpid())]
    environment = {"HOME": str(inside), "TMPDIR": str(inside)}
    try:
        process = subprocess.Popen(
            command,
            cwd=inside,
            env=environment,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=[to_read, back_write],
            start_new_session=True,
        )
    finally:
        os.close(to_read)
        os.close(back_write)
    try:
        with os.fdopen(to_write, "wb") as pipe, suppress(BrokenPipeError):
            pipe.write(told)
        with suppress(subprocess.TimeoutExpired):
            process.wait(wall_s)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # Whoever else holds the pipe cannot keep this from ending: it is read without waiting.
        os.set_blocking(back_read, False)
        with os.fdopen(back_read, "rb") as pipe:
            answer = pipe.read() or b""
    return answer.decode(errors="replace")


def _read(path: Path, most: int) -> str:
    with path.open("rb") as file:
        return file.read(most).decode(errors="replace")
