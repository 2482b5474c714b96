"""Items of the kinds `optimizer` and `schedule`: what they are, and how a config's name becomes one.

A plugin declares an optimizer by an `Item` whose target has the shape of `OptimizerRecipe`: it needs nothing from this
package. Recipes are light: torch is imported when `build` is called, because options are checked long before.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pegbox.config import validate
from pegbox.errors import ConfigError, did_you_mean
from pegbox.section import Section

from pegbox_optim.config import OptimConfig

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


class OptimizerRecipe(Protocol):
    """The target of an item of kind `optimizer`.

    Attributes:
        options: the model of `optim.options`.
        schedules: names of the schedules it allows; None: all.
    """

    @property
    def options(self) -> type[Section]: ...
    @property
    def schedules(self) -> tuple[str, ...] | None: ...

    def build(self, ctx: Context, model: Model, groups: Sequence[dict[str, Any]], options: Any) -> Optimizer:
        """Make the optimizer.

        Args:
            groups: torch's parameter groups; `params` holds (name, parameter) pairs, and each group has its `lr` and
                `weight_decay`.
            options: a valid instance of `self.options`.

        Raises:
            ConfigError: this model, device or number of processes is not for it.
        """


class ScheduleRecipe(Protocol):
    """The target of an item of kind `schedule`.

    Attributes:
        options: the model of `optim.schedule_options`.
        endless: it does not depend on the length of the run.
        warms_up: the settings of the warm-up have a meaning.
    """

    @property
    def options(self) -> type[Section]: ...
    @property
    def endless(self) -> bool: ...
    @property
    def warms_up(self) -> bool: ...

    def build(self, optimizer: Optimizer, warmup_steps: int, total_steps: int | None, options: Any) -> LRScheduler:
        """Make the schedule; `total_steps` is a number unless it is endless."""


def check(ctx: Context) -> None:
    """Raise unless names and options of the section are valid and fit together; imports nothing heavy.

    Raises:
        ConfigError: with the file and line, and what was probably meant.
    """
    config, (optimizer, _), (schedule, _) = ctx.section(OptimConfig), optimizer_of(ctx), schedule_of(ctx)
    if optimizer.schedules is not None and config.schedule not in optimizer.schedules:
        raise ConfigError(
            f"optim.schedule is '{config.schedule}', but {config.name} allows only {', '.join(optimizer.schedules)}",
            "This optimizer makes its own learning-rate schedule; a second one would multiply it.",
            f"Set optim.schedule to {optimizer.schedules[0]}.",
        )
    if not schedule.warms_up and (config.warmup_steps or config.warmup_ratio):
        raise ConfigError(
            f"optim.schedule '{config.schedule}' takes no warm-up, but one is set",
            "It would do nothing.",
            "Remove optim.warmup_steps and optim.warmup_ratio, or choose another schedule: "
            "constant_with_warmup begins with a warm-up and then stays.",
        )


def optimizer_of(ctx: Context) -> tuple[OptimizerRecipe, Any]:
    """The optimizer that the config names, and its valid options."""
    config = ctx.section(OptimConfig)
    recipe = _target(ctx, "optimizer", config.name, "name")
    return recipe, validate(recipe.options, dict(config.options), ctx.config.layer, ("optim", "options"))


def schedule_of(ctx: Context) -> tuple[ScheduleRecipe, Any]:
    """The schedule that the config names, and its valid options."""
    config = ctx.section(OptimConfig)
    recipe = _target(ctx, "schedule", config.schedule, "schedule")
    options = dict(config.schedule_options)
    return recipe, validate(recipe.options, options, ctx.config.layer, ("optim", "schedule_options"))


def _target(ctx: Context, kind: str, name: str, key: str) -> Any:
    items = ctx.items(kind)
    if name not in items:
        raise ConfigError(
            f"optim.{key} is '{name}', and no active plugin has such an {kind}"
            if kind == "optimizer"
            else f"optim.{key} is '{name}', and no active plugin has such a {kind}",
            did_you_mean(name, items, "There are:"),
            f"Correct optim.{key}, or add the plugin that brings it to plugins.",
        )
    target = items[name].target
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
