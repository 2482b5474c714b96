"""The load-balancing loss of mixtures of experts, added to whatever loss the run has."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Loss, Model


class RouterLossPlugin:
    """Wraps `build_loss`: the loss gets one more term."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_router_loss.config import RouterLossConfig

        return ConfigSection(schema=RouterLossConfig)

    @hookimpl(wrapper=True)
    def build_loss(self, ctx: Context, model: Model) -> Generator[None, Loss, Loss]:
        from pegbox_router_loss.loss import with_router_loss

        return with_router_loss(ctx, model, (yield))
