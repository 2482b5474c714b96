"""From the section `optim` to an optimizer, its schedule, and options of parameters by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pegbox.errors import UserError
from pegbox.types import GroupOptions, Optimization

from pegbox_optim.config import OptimConfig
from pegbox_optim.groups import torch_groups
from pegbox_optim.items import optimizer_of, schedule_of
from pegbox_optim.warmup import warmup_steps

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, ParameterGroup


def build(ctx: Context, model: Model, groups: Sequence[ParameterGroup]) -> Optimization:
    """The optimizer and schedule that the config names, over the merged groups.

    Raises:
        ConfigError: the schedule does not fit the length of the run.
        UserError: nothing is trainable.
    """
    config = ctx.section(OptimConfig)
    recipe, options = optimizer_of(ctx)
    schedule, schedule_options = schedule_of(ctx)
    warmup = warmup_steps("optim", config, ctx.total_steps, endless=schedule.endless)
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
