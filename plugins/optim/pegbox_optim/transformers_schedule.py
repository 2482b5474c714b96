"""The learning-rate schedule: transformers' `get_scheduler`, by its own names."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pegbox.errors import ConfigError

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from pegbox_optim.adamw_config import AdamwConfig


ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt")
"""Schedules that do not depend on the length of the run."""


def build_schedule(config: AdamwConfig, optimizer: Optimizer, total_steps: int | None) -> LRScheduler:
    """The schedule over `total_steps` optimizer steps; None is a run with an open end.

    Raises:
        ConfigError: the warmup is longer than the run, the schedule needs the run's length and it has none,
        or the
            schedule has no such option.
    """
    from transformers import get_scheduler

    if total_steps is None and (config.schedule not in ENDLESS or config.warmup_ratio):
        raise ConfigError(
            f"adamw.schedule is '{config.schedule}', but the run has an open end",
            "The schedule, or the length of its warmup, follows from the number of steps.",
            f"Set the run's number of steps, or adamw.schedule to one of: {', '.join(ENDLESS)}.",
        )
    warmup = warmup_steps(config, total_steps or 0)
    if total_steps is not None and warmup > total_steps:
        raise ConfigError(
            f"adamw.warmup_steps is {warmup}, but the run has {total_steps} steps",
            "The learning rate would never reach its peak.",
            "Lower adamw.warmup_steps, or use adamw.warmup_ratio.",
        )
    options = dict(config.schedule_options)
    try:
        return get_scheduler(config.schedule, optimizer, warmup, total_steps, options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"adamw.schedule_options {options} do not fit the schedule '{config.schedule}': {error}",
            "They are passed to transformers' function of that schedule.",
            f"See transformers.get_scheduler for the options of '{config.schedule}'.",
        ) from error


def warmup_steps(config: AdamwConfig, total_steps: int) -> int:
    """Length of the warmup in optimizer steps."""
    if config.warmup_ratio is not None:
        return math.ceil(config.warmup_ratio * total_steps)
    return config.warmup_steps or 0
