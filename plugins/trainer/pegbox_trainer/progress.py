"""What a person sees of a run: a bar on a terminal, plain lines elsewhere, nothing on other ranks."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

ACCURACIES = ("rewards/accuracies", "accuracy")
"""How methods of preferences call the share of answers that are told apart; lines begin with what says most."""
GROUPS = ("rewards/", "logps/")
"""Figures with a slash in their name that the line of an evaluation shows; `metrics.jsonl` has the others."""
Style = Literal["auto", "bar", "lines", "none"]


class RunProgress:
    """Shows steps and metrics while it is entered."""

    def __init__(self, style: Style, total_steps: int | None, *, shown: bool) -> None:
        self._console = Console(highlight=False, soft_wrap=True, file=sys.stdout)
        if style == "auto":
            style = "bar" if self._console.is_terminal else "lines"
        self._style: Style = style if shown else "none"
        self._total = total_steps
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._first_step, self._began = 0, time.perf_counter()

    def begin(self, step: int) -> None:
        """Start counting at a step."""
        self._first_step, self._began = step, time.perf_counter()
        if self._style == "bar":
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task("", total=self._total, completed=step)
            self._bar.start()

    def step(self, step: int) -> None:
        """An optimizer step was launched; nothing is read from the device."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def logged(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics were read."""
        if self._bar is not None:
            self._bar.update(self._task, description=_short(metrics))
        elif self._style == "lines":
            size = f"{metrics['tokens_per_step']:,.0f} tokens/step"
            self._print(f"step {self._of(step)}  {_short(metrics)}  {size}{self._left(step)}")

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """An evaluation ended."""
        shown = (name for name in metrics if "/" not in name or any(group in name for group in GROUPS))
        self.note(f"step {self._of(step)}  " + "  ".join(f"{name} {metrics[name]:.4f}" for name in shown))

    def note(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._style != "none":
            self._print(text)

    def _of(self, step: int) -> str:
        return str(step) if self._total is None else f"{step}/{self._total}"

    def _left(self, step: int) -> str:
        if self._total is None:
            return ""
        step_s = (time.perf_counter() - self._began) / max(step - self._first_step, 1)
        return f"  ETA {timedelta(seconds=round((self._total - step) * step_s))}"

    def _print(self, text: str) -> None:
        console = self._bar.console if self._bar is not None else self._console
        console.print(text, markup=False)

    def __enter__(self) -> RunProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _short(metrics: Mapping[str, float]) -> str:
    reward = f"reward {metrics['reward']:.4f}  " if "reward" in metrics else ""
    told_apart = next((f"accuracy {metrics[name]:.2f}  " for name in ACCURACIES if name in metrics), "")
    return (
        f"{reward}loss {metrics['loss']:.4f}  {told_apart}grad norm {metrics['grad_norm']:.3f}  "
        f"lr {metrics['learning_rate']:.2e}  {metrics['tokens_per_s']:,.0f} tokens/s"
    )
