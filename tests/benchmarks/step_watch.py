"""What is measured of a training run: the time of each step, memory, the loss, and the kernels of a few steps."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

WARM_UP, TIMED, PROFILED = 4, 5, 2
STEPS = WARM_UP + TIMED


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class Watch:
    """Waits for the device after each step and reads the clock; looks at the kernels of a few steps if asked to.

    Attributes:
        seconds: each step took; the first with all that was before it since this was made.
        loss: of the last step.
        trained: how many parameters are.
    """

    def __init__(self, kernels: int) -> None:
        self.steps = WARM_UP + PROFILED if kernels else STEPS
        self.seconds: list[float] = []
        self.kernels: list[str] = []
        self.loss, self.trained = float("nan"), 0
        self._shown, self._last = kernels, time.perf_counter()
        self._profiler: profile | None = None

    def trains(self, module: nn.Module) -> None:
        """Count what is trained of a module."""
        self.trained = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)

    def stepped(self) -> None:
        """A step was taken, or is on its way."""
        if device() == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._last)
        if len(self.seconds) == WARM_UP:
            if device() == "cuda":
                torch.cuda.reset_peak_memory_stats()
            if self._shown:
                self._profiler = profile(activities=[_activity()])
                self._profiler.start()
        elif self._profiler is not None and len(self.seconds) == self.steps:
            self._profiler.stop()
            self.kernels = busiest(self._profiler, sum(self.seconds[WARM_UP:]), self._shown)
        self._last = time.perf_counter()

    def found(self) -> dict[str, Any]:
        """What this process measured."""
        peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if device() == "cuda" else (0, 0)
        return {
            "seconds": self.seconds,
            "loss": self.loss,
            "trained": self.trained,
            "peak_bytes": peaks[0],
            "reserved_bytes": peaks[1],
            "kernels": self.kernels,
            "gpu": torch.cuda.get_device_name() if device() == "cuda" else "cpu",
            "torch": torch.__version__,
        }


def _activity() -> ProfilerActivity:
    return ProfilerActivity.CUDA if device() == "cuda" else ProfilerActivity.CPU


GAP_US = 20
"""From here on the GPU waited for the host; below it is what lies between two kernels."""
GAPS = 8


def busiest(profiler: profile, seconds: float, count: int) -> list[str]:
    """Lines for the kernels that took most time; before them how long a step was, and where the GPU was idle.

    Args:
        seconds: how long the profiled steps took together.
    """
    kernels = [
        event
        for event in profiler.events()
        if event.device_type.name.lower() == device() and not getattr(event, "is_user_annotation", False)
    ]
    total: dict[str, float] = {}
    times: dict[str, int] = {}
    gaps: dict[str, list[float]] = {}
    busy = end = 0.0
    before = ""
    for kernel in sorted(kernels, key=lambda kernel: kernel.time_range.start):
        span = kernel.time_range
        total[kernel.name] = total.get(kernel.name, 0.0) + span.end - span.start
        times[kernel.name] = times.get(kernel.name, 0) + 1
        if before and span.start > end:
            long = span.start - end >= GAP_US
            where = f"{before[:50]} -> {kernel.name[:50]}" if long else f"gaps below {GAP_US} us"
            gaps.setdefault(where, []).append(span.start - end)
        busy += max(0.0, span.end - max(span.start, end))
        end, before = max(end, span.end), kernel.name
    idle = 1 - busy / 1e6 / seconds
    lines = [f"{1e3 * seconds / PROFILED:9.2f} ms a step; the device is idle {idle:.1%} of it"]
    for where in sorted(gaps, key=lambda where: -sum(gaps[where]))[:GAPS]:
        waited, often = sum(gaps[where]) / 1e3 / PROFILED, len(gaps[where]) / PROFILED
        lines.append(f"{waited:9.2f} ms  {often:7.1f} x  idle: {where}")
    for name in sorted(total, key=lambda name: -total[name])[:count]:
        lines.append(f"{total[name] / 1e3 / PROFILED:9.2f} ms  {times[name] / PROFILED:7.1f} x  {name[:110]}")
    return lines
