"""From the section `optim` to an optimizer, its schedule, and options of parameters by name."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pegbox.errors import ConfigError, UserError
from pegbox.types import GroupOptions, Optimization

from pegbox_optim.config import OptimConfig
from pegbox_optim.groups import torch_groups
from pegbox_optim.items import check, optimizer_of, schedule_of

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, ParameterGroup


def build(ctx: Context, model: Model, groups: Sequence[ParameterGroup]) -> Optimization:
    """The optimizer and schedule that the config names, over the merged groups.

    Raises:
        ConfigError: options do not fit, or the schedule does not fit the length of the run.
        UserError: nothing is trainable.
    """
    check(ctx)
    config = ctx.section(OptimConfig)
    recipe, options = optimizer_of(ctx)
    schedule, schedule_options = schedule_of(ctx)
    warmup = _warmup_steps(config, ctx.total_steps, endless=schedule.endless)
    optimizer = recipe.build(ctx, model, torch_groups(config, model, groups), options)
    return Optimization(
        optimizer=optimizer, schedule=schedule.build(optimizer, warmup, ctx.total_steps, schedule_options)
    )


def group_options(config: OptimConfig, model: Model) -> list[GroupOptions]:
    """What the config says of parameters by name."""
    options = [
        GroupOptions(
            pattern=group.pattern,
            learning_rate=group.learning_rate,
            learning_rate_scale=group.scale,
            weight_decay=group.weight_decay,
        )
        for group in config.groups
    ]
    if config.embedding_learning_rate is None and config.embedding_scale is None:
        return options
    trained = [name for name in embedding_names(model) if dict(model.module.named_parameters())[name].requires_grad]
    if not trained:
        raise UserError(
            f"optim gives the embeddings a learning rate of their own, but {model.name} trains no embedding",
            "The setting would do nothing.",
            "Remove it, or train them: with lora, name them in lora.modules_to_save.",
        )
    pattern = f"^(?:{'|'.join(re.escape(name) for name in trained)})$"
    absolute, factor = config.embedding_learning_rate, config.embedding_scale
    return [*options, GroupOptions(pattern=pattern, learning_rate=absolute, learning_rate_scale=factor)]


def embedding_names(model: Model) -> list[str]:
    """Names of the parameters of the model's embeddings and head, adapters of them included."""
    asked = (getattr(model.module, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    parts: list[Any] = [part for ask in asked if ask is not None and (part := ask()) is not None]
    own = {id(parameter) for part in parts for parameter in part.parameters()}
    return [name for name, parameter in model.module.named_parameters() if id(parameter) in own]


def _warmup_steps(config: OptimConfig, total_steps: int | None, *, endless: bool) -> int:
    if total_steps is None and (not endless or config.warmup_ratio):
        raise ConfigError(
            f"optim.schedule is '{config.schedule}', but the run has an open end",
            "The schedule, or the length of its warm-up, follows from the number of steps.",
            "Set the run's number of steps, or optim.schedule to constant_with_warmup with optim.warmup_steps.",
        )
    if config.warmup_ratio is not None:
        return math.ceil(config.warmup_ratio * (total_steps or 0))
    warmup = config.warmup_steps or 0
    if total_steps is not None and warmup > total_steps:
        raise ConfigError(
            f"optim.warmup_steps is {warmup}, but the run has {total_steps} steps",
            "The learning rate would never reach its peak.",
            "Lower optim.warmup_steps, or use optim.warmup_ratio.",
        )
    return warmup
