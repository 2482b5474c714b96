"""One measured run, in a process of its own: a fresh context of the device, and a peak that is this run's alone.

The request comes as a line of JSON on standard input, which stays open as long as the parent lives: when it closes,
this process and all that it started end. The run is observed by one more plugin, which takes the loss of each step from
the events, speed and memory from the figures that the loop logs, and cuts the run off after the last step, before
anything is exported. Answers are written to `result.json`.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Generator, Mapping
from contextlib import chdir, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegbox.errors import ConfigError, PegboxError, RunError, UserError
from pegbox.events import Event, Logged, RunStarted, Stepped
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.run import execute

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Outcome
    from torch import Tensor

NAME = "ablate"
RESULT = "result.json"
NEEDED = ("tokens_per_s", "tokens_per_step")


class Measured(Exception):
    """No error: the last step was made: the run is cut off here."""


@dataclass(frozen=True)
class Measurement:
    """What one run showed.

    Attributes:
        plugins: those that were active, the observer aside.
        loss: of each step, from the first.
        tokens_per_s: over the timed steps.
        peak_bytes: the most memory at once: allocated by torch on a CUDA device, else resident in the process.
        memory: which of the two.
        device: the type of the device.
        precision: the arithmetic of forwards.
    """

    plugins: tuple[str, ...]
    loss: tuple[float, ...]
    tokens_per_s: float
    peak_bytes: int
    memory: str
    device: str
    precision: str


@dataclass(eq=False)
class Measuring:
    """The observer of a measured run: a plugin that the config does not name."""

    steps: int
    warmup: int
    losses: list[Tensor] = field(default_factory=list)
    tokens: float = 0.0
    seconds: float = 0.0
    read_at: int = 0
    taken: Measurement | None = None

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._require_length(event.job.train.total_steps)
        elif isinstance(event, Stepped):
            self.losses.append(event.loss.detach())
        elif isinstance(event, Logged):
            self._read(ctx, event.step, event.metrics)

    @hookimpl(wrapper=True)
    def run_training(self) -> Generator[None, Outcome, Outcome]:
        """A training that ends by itself is too short to be measured; nothing of it may be exported."""
        outcome = yield
        raise RunError(
            f"the run {outcome.reason} at step {outcome.step}, before step {self.steps}",
            "A plugin asked it to stop.",
            f"Type: --steps {outcome.step} --warmup {max(1, outcome.step // 3)}",
        )

    def _require_length(self, total: int | None) -> None:
        if total is not None and total < self.steps:
            raise ConfigError(
                f"the run has {total} steps, and {self.steps} are to be measured",
                "Each run takes the first steps of the run as it is configured.",
                f"Type: --steps {total} --warmup {max(1, total // 3)}   (or lengthen the run: trainer.max_steps)",
            )

    def _read(self, ctx: Context, step: int, metrics: Mapping[str, float]) -> None:
        if missing := [name for name in NEEDED if name not in metrics]:
            raise RunError(
                f"the loop does not log {' and '.join(missing)}",
                "Speed is read from the figures that the loop logs.",
                "Ablate a config whose owner of run_training is the plugin trainer.",
            )
        if step > self.warmup:
            tokens = metrics["tokens_per_step"] * (step - self.read_at)
            self.tokens, self.seconds = self.tokens + tokens, self.seconds + tokens / metrics["tokens_per_s"]
        self.read_at = step
        if step < self.steps:
            return
        on_device = metrics.get("peak_memory_bytes")
        self.taken = Measurement(
            plugins=tuple(name for name in ctx.kernel.active if name != NAME),
            loss=tuple(float(loss) for loss in self.losses),
            tokens_per_s=self.tokens / self.seconds,
            peak_bytes=peak_resident_bytes() if on_device is None else int(on_device),
            memory="peak RSS" if on_device is None else "peak memory",
            device=ctx.runtime.device.type,
            precision=ctx.runtime.precision,
        )
        raise Measured


def peak_resident_bytes() -> int:
    """The most memory that this process had in RAM at once.

    Linux passes the figure of getrusage on from the process that started this one; the one in /proc is this program's.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def run(request: Mapping[str, Any]) -> dict[str, Any]:
    """Make the run; what it showed, or why it could not be made."""
    measuring = Measuring(request["steps"], request["warmup"])
    data = {**request["data"], "plugins": [*request["data"]["plugins"], NAME], "output": request["output"]}
    try:
        with chdir(request["folder"]):
            ctx = compose(data, instances={NAME: measuring})
        with suppress(Measured):
            execute(ctx)
    except PegboxError as error:
        traceback.print_exc()
        return {"refused": isinstance(error, UserError), "error": [error.what, error.why, error.next]}
    except Exception as error:
        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        return {"refused": False, "error": [f"{type(error).__name__}: {first}", "", ""]}
    assert measuring.taken is not None, "a run that ends without an error was measured"
    return asdict(measuring.taken)


def end_with_parent() -> None:
    """Wait until standard input closes, then end every process of this run."""
    while os.read(0, 1):
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main() -> None:
    """Read the request, make the run, write the answer."""
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    answer = run(request)
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
