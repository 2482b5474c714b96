"""Weights, gradients and optimizer state in shards, one on each process: FSDP2 of torch."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, ModelOptions


class FsdpPlugin:
    """Owns `place_model`; has other processes get their weights from the first; makes weights whole for the export."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_fsdp.config import FsdpConfig

        return ConfigSection(schema=FsdpConfig)

    @hookimpl
    def configure_model(self, ctx: Context) -> ModelOptions | None:
        from pegbox_fsdp.asking import ask

        return ask(ctx)

    @hookimpl
    def place_model(self, ctx: Context, model: Model) -> Model:
        from pegbox_fsdp.placement import place

        return place(ctx, model)

    @hookimpl(wrapper=True)
    def export_model(self, ctx: Context, model: Model) -> Generator[None, Path, Path]:
        """Weights are whole on the first process while the owner writes them."""
        from pegbox_fsdp.gathering import whole

        with whole(ctx, model):
            return (yield)
