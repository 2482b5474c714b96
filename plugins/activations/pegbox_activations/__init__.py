"""Gradient checkpointing and activation offload: what is kept between forward and backward, and where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pegbox.events import Event, GradientsReady
from pegbox.hooks import Stage, hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, ModulePatch

    from pegbox_activations.attention import AttentionKeeper
    from pegbox_activations.auto import AutoPolicy


class ActivationsPlugin:
    """Patches the decoder layers at the stage `recompute`; under the policy `auto` it learns from the first steps."""

    _auto: AutoPolicy | None = None
    _keeper: AttentionKeeper | None = None

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_activations.config import ActivationsConfig

        return ConfigSection(schema=ActivationsConfig)

    @hookimpl
    def patch_modules(self, ctx: Context, model: Model, stage: Stage) -> Sequence[ModulePatch]:
        if stage != "recompute" or model.role != "policy":
            return []
        from pegbox_activations.attention import AttentionKeeper
        from pegbox_activations.config import ActivationsConfig
        from pegbox_activations.patching import auto_patches, patches, require_budget

        config = ctx.section(ActivationsConfig)
        if config.policy == "auto":
            require_budget(config, ctx)
            records, self._auto = auto_patches(config, model)
            return records
        keeper = AttentionKeeper()
        self._keeper = keeper if config.keep == "attention" else None
        return patches(config, model, keeper)

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        if self._auto is not None:
            self._auto.on_event(ctx, event)
        if self._keeper is not None and isinstance(event, GradientsReady):
            from pegbox_activations.patching import require_kept

            require_kept(self._keeper)
            self._keeper = None
