"""A base quantized by bitsandbytes under an adapter: QLoRA (Dettmers et al. 2023, arXiv:2305.14314) and int8."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, ModelOptions, ModelRequest


class BnbPlugin:
    """Asks for the quantization, and looks at what was loaded."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_bnb.config import BnbConfig

        return ConfigSection(schema=BnbConfig)

    @hookimpl
    def configure_model(self, ctx: Context) -> ModelOptions:
        from pegbox_bnb.quantization import options

        return options(ctx)

    @hookimpl(wrapper=True)
    def load_model(self, ctx: Context, request: ModelRequest) -> Generator[None, Model, Model]:
        from pegbox_bnb.inspection import inspected

        return inspected(ctx, request, (yield))
