"""Trackers: the figures of a run in TensorBoard, Weights & Biases, MLflow, Comet, SwanLab or Trackio, by accelerate."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from pegbox.events import Event, RunStarted
from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Runtime

    from pegbox_trackers.tracking import Tracking


class TrackersPlugin:
    """Observes the run on rank 0. A tracker that fails does not stop the run."""

    best_effort = True
    _tracking: Tracking | None = None

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_trackers.config import TrackersConfig

        return ConfigSection(schema=TrackersConfig)

    @hookimpl(wrapper=True)
    def build_runtime(self, ctx: Context) -> Generator[None, Runtime, Runtime]:
        from pegbox_trackers.config import TrackersConfig
        from pegbox_trackers.libraries import require_libraries

        require_libraries(ctx.section(TrackersConfig))
        return (yield)

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        from pegbox_trackers.tracking import Tracking

        if isinstance(event, RunStarted) and ctx.runtime.rank == 0:
            self._tracking = Tracking(ctx)
        if self._tracking is not None:
            self._tracking.take(event)
