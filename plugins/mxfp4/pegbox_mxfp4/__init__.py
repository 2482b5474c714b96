"""Experts of a mixture kept packed in MXFP4, 4.25 bits a number, under an adapter."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from pegbox.events import Event, RunStarted
from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, ModelOptions, ModelRequest


class Mxfp4Plugin:
    """Asks for packed experts, and looks at what was loaded."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_mxfp4.config import Mxfp4Config

        return ConfigSection(schema=Mxfp4Config)

    @hookimpl
    def configure_model(self, ctx: Context) -> ModelOptions:
        from pegbox_mxfp4.options import options

        return options(ctx)

    @hookimpl(wrapper=True)
    def load_model(self, ctx: Context, request: ModelRequest) -> Generator[None, Model, Model]:
        from pegbox_mxfp4.inspection import inspected, require_one_process

        require_one_process(ctx, request)
        return inspected(ctx, request, (yield))

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        if isinstance(event, RunStarted):
            from pegbox_mxfp4.inspection import require_cheap_adapters

            require_cheap_adapters(ctx, event.job.model)
