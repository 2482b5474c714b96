"""NEFTune: noise on the embeddings while training (Jain et al. 2023, arXiv:2310.05914)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from pegbox.events import Event, RunStarted, Stepped
from pegbox.hooks import Stage, hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, ModulePatch

    from pegbox_neftune.noise import EmbeddingNoise


class NeftunePlugin:
    """Patches the input embeddings of the policy; the batch of each forward tells whose noise it is."""

    def __init__(self) -> None:
        self._noise: EmbeddingNoise | None = None

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_neftune.config import NeftuneConfig

        return ConfigSection(schema=NeftuneConfig)

    @hookimpl
    def patch_modules(self, ctx: Context, model: Model, stage: Stage) -> Sequence[ModulePatch]:
        if stage != "adapted" or model.role != "policy":
            return []
        from pegbox_neftune.config import NeftuneConfig
        from pegbox_neftune.noise import EmbeddingNoise

        self._noise = EmbeddingNoise(ctx, ctx.section(NeftuneConfig).alpha)
        return self._noise.patches(model)

    @hookimpl(wrapper=True)
    def place_model(self) -> Generator[None, Model, Model]:
        """Let every forward of the policy say which rows it computes."""
        model = yield
        return self._noise.following(model) if self._noise is not None and model.role == "policy" else model

    @hookimpl
    def on_event(self, event: Event) -> None:
        if isinstance(event, RunStarted | Stepped) and self._noise is not None:
            self._noise.step = event.step
