"""ReLoRA: an adapter that is merged into the base and begun anew every N steps (arXiv:2307.05695)."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from pegbox.events import Event, RunStarted, Stepped
from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, ModelOptions, Optimization

    from pegbox_relora.restarts import Restarts


class ReloraPlugin:
    """Restarts the adapter that another plugin applies, with its optimizer states and learning rate."""

    _restarts: Restarts | None = None

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_relora.config import ReloraConfig

        return ConfigSection(schema=ReloraConfig)

    @hookimpl
    def configure_model(self, ctx: Context) -> ModelOptions:
        from pegbox_relora.conditions import model_options

        return model_options(ctx)

    @hookimpl(wrapper=True)
    def apply_adapters(self, ctx: Context) -> Generator[None, Model, Model]:
        model = yield
        from dataclasses import replace

        from pegbox_relora.restarts import Restarts

        self._restarts = Restarts(ctx, model)
        # The base moves, so an adapter alone would fit nothing: what is exported is the whole model.
        return replace(model, adapter=None)

    @hookimpl(wrapper=True)
    def build_optimizer(self, ctx: Context) -> Generator[None, Optimization, Optimization]:
        optimization = yield
        from pegbox_relora.schedule import with_restarts

        return with_restarts(ctx, optimization)

    @hookimpl(wrapper=True)
    def export_model(self, model: Model) -> Generator[None, Path, Path]:
        if self._restarts is not None:
            self._restarts.finish(model)
        return (yield)

    @hookimpl
    def on_event(self, event: Event) -> None:
        if self._restarts is None:
            return
        if isinstance(event, RunStarted):
            self._restarts.require_whole_weights()
        elif isinstance(event, Stepped):
            self._restarts.after(event.step, event.optimizer)

    def state_dict(self) -> dict[str, object]:
        """The base weights as they are after the restarts so far, and how many there were."""
        return {} if self._restarts is None else self._restarts.state_dict()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        if self._restarts is not None:
            self._restarts.load_state_dict(state_dict)
