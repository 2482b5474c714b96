"""Optimizers and learning-rate schedules.

`adamw` is AdamW with the schedules of transformers, in one flat section. `optim` takes an optimizer and a schedule by
name, from any active plugin that declares one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection, Item

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import GroupOptions, Model, Optimization, ParameterGroup

OPTIMIZERS = {
    "adamw": "AdamW of torch, fused.",
    "sgd": "Stochastic gradient descent of torch.",
    "adafactor": "Adafactor of torch: its state is a row and a column for each matrix.",
    "rmsprop": "RMSprop of torch.",
    "adagrad": "Adagrad of torch.",
    "muon": "Muon of torch for hidden matrices, AdamW for the rest.",
}


class AdamwPlugin:
    """Owns `build_optimizer`."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_optim.adamw_config import AdamwConfig

        return ConfigSection(schema=AdamwConfig)

    @hookimpl
    def build_optimizer(self, ctx: Context, model: Model, groups: Sequence[ParameterGroup]) -> Optimization:
        from pegbox.types import Optimization

        from pegbox_optim.adamw import build_adamw, build_schedule
        from pegbox_optim.adamw_config import AdamwConfig

        config = ctx.section(AdamwConfig)
        optimizer = build_adamw(config, model, groups)
        return Optimization(optimizer=optimizer, schedule=build_schedule(config, optimizer, ctx.total_steps))


class OptimPlugin:
    """Owns `build_optimizer`; gives parameters their options by name; declares torch's optimizers and the schedules."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_optim.config import OptimConfig

        return ConfigSection(schema=OptimConfig)

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        from pegbox_optim.schedules import SCHEDULES

        optimizers = [
            Item(kind="optimizer", name=name, target=f"pegbox_optim.optimizers:{name.upper()}", doc=doc)
            for name, doc in OPTIMIZERS.items()
        ]
        schedules = [Item(kind="schedule", name=name, target=made, doc=made.doc) for name, made in SCHEDULES.items()]
        return optimizers + schedules

    @hookimpl
    def configure_groups(self, ctx: Context, model: Model) -> Sequence[GroupOptions]:
        from pegbox_optim.building import group_options
        from pegbox_optim.config import OptimConfig

        return group_options(ctx.section(OptimConfig), model)

    @hookimpl
    def build_optimizer(self, ctx: Context, model: Model, groups: Sequence[ParameterGroup]) -> Optimization:
        from pegbox_optim.building import build

        return build(ctx, model, groups)
