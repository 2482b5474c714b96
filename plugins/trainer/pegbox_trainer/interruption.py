"""Ctrl-C and SIGTERM as a wish: the loop finishes its step, saves, and returns.

A second Ctrl-C does not wait for that. SIGTERM is what schedulers and torchrun send before they kill;
torchrun sends it after it got a Ctrl-C itself, so it never counts as a second one.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interruption:
    """Notes that someone wants the run to stop, while it is entered."""

    def __init__(self) -> None:
        self.requested = False
        self._ctrl_c = 0
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
        self._ctrl_c += number == signal.SIGINT
        if self._ctrl_c > 1:
            raise KeyboardInterrupt
