"""The jagged learning rate: the schedule of the run, lowered around each restart (arXiv:2307.05695, figure 2).

    rate(n) = schedule(n) * (k + 1) / warmup          for the first steps k = n mod N after a restart
    rate(n) = schedule(n) * (N - k) / (anneal + 1)    for the last steps before one

with n the steps made so far. The paper begins at zero; a step at rate zero is lost, so this begins one later.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from pegbox.errors import ConfigError

from pegbox_relora.config import ReloraConfig

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Optimization
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


def with_restarts(ctx: Context, optimization: Optimization) -> Optimization:
    """The same optimizer with the jagged form of its schedule.

    Raises:
        ConfigError: the run ends before the first restart, or the optimizer keeps its own average of the weights.
    """
    settings = ctx.section(ReloraConfig)
    if ctx.total_steps is not None and settings.every >= ctx.total_steps:
        raise ConfigError(
            f"relora.every is {settings.every}, but the run has {ctx.total_steps} steps",
            "The adapter would never be begun anew.",
            "Lower relora.every, or remove relora from plugins.",
        )
    name = type(optimization.optimizer).__name__
    if callable(getattr(optimization.optimizer, "eval", None)):
        raise ConfigError(
            f"relora is listed, and the optimizer is {name}, which is schedule-free",
            "It keeps averages of the weights, which a restart would leave behind.",
            "Use an optimizer with a schedule, such as adamw.",
        )
    if settings.prune == "reset" and optimization.optimizer.state:
        raise ConfigError(
            f"relora.prune is reset, but {name} makes its states once, when it is built",
            "States that were dropped would not come back.",
            "Set relora.prune to magnitude.",
        )
    jagged = JaggedSchedule(optimization.schedule, optimization.optimizer, settings)
    return replace(optimization, schedule=cast("LRScheduler", jagged))


def factor(settings: ReloraConfig, step: int) -> float:
    """What the schedule's learning rate is multiplied by for the optimizer step after `step` steps."""
    since = step % settings.every
    rising = 1.0
    if step >= settings.every and settings.warmup_steps:
        rising = min(1.0, (since + 1) / settings.warmup_steps)
    left = settings.every - since
    return min(rising, left / (settings.anneal_steps + 1), 1.0)


class JaggedSchedule:
    """A schedule around another one, with the part of its interface that a training loop uses."""

    def __init__(self, inner: LRScheduler, optimizer: Optimizer, settings: ReloraConfig) -> None:
        self._inner, self._optimizer, self._settings = inner, optimizer, settings
        self._steps = 0
        self._put(self._jagged())

    def step(self) -> None:
        """Go on by one step. The inner schedule finds the rates that it set itself: some compute from the last ones."""
        self._put(self._inner.get_last_lr())
        self._inner.step()
        self._steps += 1
        self._put(self._jagged())

    def get_last_lr(self) -> list[float]:
        return self._jagged()

    def state_dict(self) -> dict[str, object]:
        return {"inner": self._inner.state_dict(), "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._inner.load_state_dict(state_dict["inner"])
        self._steps = state_dict["steps"]

    def _jagged(self) -> list[float]:
        scale = factor(self._settings, self._steps)
        return [float(rate) * scale for rate in self._inner.get_last_lr()]

    def _put(self, rates: list[float]) -> None:
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            # Optimizers whose step is compiled, such as torchao's, keep their rate in a tensor and insist on it.
            if hasattr(group["lr"], "fill_"):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
