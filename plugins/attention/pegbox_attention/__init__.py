"""Attention: one implementation for any model, and for gpt-oss the fastest backend for each kind of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pegbox.events import Event, RunBegins
from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, ModelOptions, ModulePatch

    from pegbox_attention.capabilities import Asked


class AttentionPlugin:
    """Answers `configure_model` with a name of transformers, and patches the slot `attention`."""

    def __init__(self) -> None:
        self._asked: Asked | None = None

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_attention.config import AttentionConfig

        return ConfigSection(schema=AttentionConfig)

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        """Look at the model's shape, without its weights, before anything is read."""
        if isinstance(event, RunBegins):
            from pegbox_attention.early import asked, require_model

            self._asked = asked(ctx)
            require_model(ctx, self._asked)

    @hookimpl
    def configure_model(self, ctx: Context) -> ModelOptions:
        from pegbox_attention.early import options

        return options(ctx, self._asked)

    @hookimpl
    def patch_attention(self, ctx: Context, model: Model) -> Sequence[ModulePatch]:
        from pegbox_attention.early import records

        return records(ctx, model)


class GptOssAttentionPlugin:
    """Patches the slot `attention` of models with sinks."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_attention.sinks.config import GptOssAttentionConfig

        return ConfigSection(schema=GptOssAttentionConfig)

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        """A backend that is asked for by name and not installed is an error before anything is read."""
        if isinstance(event, RunBegins):
            from pegbox_attention.sinks.choice import require_possible
            from pegbox_attention.sinks.config import GptOssAttentionConfig

            require_possible(ctx.section(GptOssAttentionConfig), None)

    @hookimpl
    def configure_model(self, ctx: Context) -> ModelOptions:
        """The model is loaded with plain attention: another plugin that asks for its own would be overruled."""
        from pegbox.types import ModelOptions

        from pegbox_attention.sinks.choice import place_of, require_possible
        from pegbox_attention.sinks.config import GptOssAttentionConfig

        runtime = vars(ctx).get("runtime")
        if runtime is not None:
            require_possible(ctx.section(GptOssAttentionConfig), place_of(runtime))
        return ModelOptions(attention="eager")

    @hookimpl
    def patch_attention(self, ctx: Context, model: Model) -> Sequence[ModulePatch]:
        if model.role != "policy" and "attention_sinks" not in model.traits:
            return []
        from pegbox_attention.sinks.config import GptOssAttentionConfig
        from pegbox_attention.sinks.patching import patches

        return patches(ctx, ctx.section(GptOssAttentionConfig), model)
