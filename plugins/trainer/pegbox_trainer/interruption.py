"""Ctrl-C and SIGTERM as a wish: the loop finishes its step, saves, and returns.

A second Ctrl-C does not wait for that. It counts only some time after the first one: torchrun gets the same Ctrl-C and
passes it on, so that each process sees it twice at once. SIGTERM, which schedulers send before they kill, never counts
as a second one.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType

ECHO_S = 1.0
"""How long after a Ctrl-C another one is taken for its echo."""


class Interruption:
    """Notes that someone wants the run to stop, while it is entered."""

    def __init__(self) -> None:
        self.requested = False
        self._first_ctrl_c: float | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._first_ctrl_c is None:
            self._first_ctrl_c = now
        elif now - self._first_ctrl_c > ECHO_S:
            raise KeyboardInterrupt
