"""The length of the warm-up, and whether the schedule fits the length of the run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pegbox.errors import ConfigError

if TYPE_CHECKING:
    from pegbox_optim.adamw_config import AdamwConfig
    from pegbox_optim.config import OptimConfig


def warmup_steps(section: str, config: AdamwConfig | OptimConfig, total_steps: int | None, *, endless: bool) -> int:
    """Optimizer steps over which the learning rate rises.

    Args:
        section: the name of the config's section.
        total_steps: of the run; None is a run with an open end.
        endless: the schedule does not depend on the length of the run.

    Raises:
        ConfigError: the run is too short for the warm-up, or has no length to take a part of.
    """
    if total_steps is None and (not endless or config.warmup_ratio):
        raise ConfigError(
            f"{section}.schedule is '{config.schedule}', but the run has an open end",
            "The schedule, or the length of its warm-up, follows from the number of steps.",
            f"Set the run's number of steps, or {section}.schedule to constant_with_warmup with "
            f"{section}.warmup_steps.",
        )
    if config.warmup_ratio is not None:
        return math.ceil(config.warmup_ratio * (total_steps or 0))
    warmup = config.warmup_steps or 0
    if total_steps is not None and warmup > total_steps:
        raise ConfigError(
            f"{section}.warmup_steps is {warmup}, but the run has {total_steps} steps",
            "The learning rate would never reach its peak.",
            f"Lower {section}.warmup_steps, or use {section}.warmup_ratio.",
        )
    return warmup
