"""Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv:2402.01306): answers that are wanted, or not."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from pegbox import hooks
from pegbox.events import Event, RunBegins
from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection, Item

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import BatchSource
    from pegbox.types import Loss, Model


class KtoPlugin:
    """Owns `build_loss`; wraps `build_batches`, which brings what the loss needs to know of a whole step."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_kto.config import KtoConfig

        return ConfigSection(schema=KtoConfig)

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        from pegbox_kto.health import rules

        return [
            Item(kind="extra", name="kto_kl", target="pegbox_kto.batches:KL", doc="Divergence from the reference."),
            Item(kind="extra", name="kto_answers", target="pegbox_kto.batches:ANSWERS", doc="Answers of the step."),
            *rules(),
        ]

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        if isinstance(event, RunBegins):
            from pegbox_kto.config import REFERENCE, KtoConfig, require_reference

            declared = ctx.each(hooks.register_items)
            providers = [
                plugin for plugin, items in declared for item in items if (item.kind, item.name) == ("extra", REFERENCE)
            ]
            own = next(plugin for plugin, items in declared if any(item.name == "kto_kl" for item in items))
            require_reference(ctx.section(KtoConfig), list(ctx.kernel.active), providers, own)

    @hookimpl(wrapper=True)
    def build_batches(self, ctx: Context, model: Model) -> Generator[None, BatchSource, BatchSource]:
        from pegbox_kto.batches import with_step_figures
        from pegbox_kto.config import KtoConfig

        source = yield
        return with_step_figures(source, ctx.runtime, model, ctx.section(KtoConfig))

    @hookimpl
    def build_loss(self, ctx: Context) -> Loss:
        from pegbox_kto.config import KtoConfig
        from pegbox_kto.loss import KtoLoss

        return KtoLoss(ctx.section(KtoConfig))
