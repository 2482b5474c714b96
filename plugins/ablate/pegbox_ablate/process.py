"""Starting a measured run, waiting for it, and ending it with all that it started when this process is told to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from pegbox_ablate.child import RESULT, Measurement
from pegbox_ablate.variants import Variant

ENDINGS = (signal.SIGTERM, signal.SIGHUP)
LOG, LOG_LINES = "log.txt", 20


@dataclass(frozen=True)
class Failure:
    """A run that could not be made, or broke.

    Attributes:
        refused: the run says that its input is wrong; else it broke while it ran.
        log: the last lines that the run printed.
    """

    refused: bool
    what: str
    why: str = ""
    next: str = ""
    log: str = ""


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and a closed terminal are taken as Ctrl-C is: what was started ends, temporary folders go."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # What is ignored stays ignored: a run under nohup outlives its terminal.
    heard = [number for number in ENDINGS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def measure(variant: Variant, place: Path, steps: int, warmup: int) -> Measurement | Failure:
    """Make one run in a process of its own; `place` is a new folder for all that it writes."""
    place.mkdir(parents=True)
    request = {
        "data": variant.data,
        "folder": str(variant.folder),
        "output": str(place / "run"),
        "answer": str(place / RESULT),
        "steps": steps,
        "warmup": warmup,
    }
    # -P: a file beside the config must not be imported in a library's place.
    command = [sys.executable, "-P", "-m", "pegbox_ablate.child"]
    with (place / LOG).open("wb") as log:
        started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)
        code = _finish(started, request)
    printed = "\n".join((place / LOG).read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
    if not (place / RESULT).is_file():
        return Failure(False, _ending(code), log=printed)
    answer = json.loads((place / RESULT).read_text(encoding="utf-8"))
    if "error" in answer:
        what, why, next_ = answer["error"]
        return Failure(answer["refused"], what, why, next_, printed)
    return Measurement(**{**answer, "plugins": tuple(answer["plugins"]), "loss": tuple(answer["loss"])})


def _finish(process: subprocess.Popen[bytes], request: dict[str, object]) -> int:
    """Hand over the request and wait; whatever happens here, nothing of the run is left."""
    assert process.stdin is not None, "it was opened as a pipe"
    try:
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        return process.wait()
    finally:
        # The run leads a session of its own: workers that it left behind end with it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with suppress(BrokenPipeError):
            process.stdin.close()


def _ending(code: int) -> str:
    if code >= 0:
        return f"the run's process ended with exit code {code} and no answer"
    hint = ": the machine may have run out of memory" if -code == signal.SIGKILL else ""
    return f"the run's process was ended by {signal.Signals(-code).name}{hint}"
