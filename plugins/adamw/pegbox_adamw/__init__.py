"""AdamW of torch, with the learning-rate schedules of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, Optimization, ParameterGroup


class AdamwPlugin:
    """Owns `build_optimizer`."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_adamw.config import AdamwConfig

        return ConfigSection(schema=AdamwConfig)

    @hookimpl
    def build_optimizer(self, ctx: Context, model: Model, groups: Sequence[ParameterGroup]) -> Optimization:
        from pegbox.types import Optimization

        from pegbox_adamw.config import AdamwConfig
        from pegbox_adamw.optimizer import build_adamw
        from pegbox_adamw.schedule import build_schedule

        config = ctx.section(AdamwConfig)
        optimizer = build_adamw(config, model, groups)
        return Optimization(optimizer=optimizer, schedule=build_schedule(config, optimizer, ctx.total_steps))
