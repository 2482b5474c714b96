"""Sample generations at each evaluation: what the model says now, on prompts that stay the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox.events import Evaluated, Event, RunStarted
from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context

    from pegbox_samples.prompts import Prompt


class SamplesPlugin:
    """Collects prompts when a run starts, and answers them at evaluations, on the first process."""

    def __init__(self) -> None:
        self._prompts: list[Prompt] = []

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_samples.config import SamplesConfig

        return ConfigSection(schema=SamplesConfig)

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        from pegbox_samples.config import SamplesConfig

        if isinstance(event, RunStarted):
            from pegbox_samples.prompts import collect

            self._prompts = collect(ctx, ctx.section(SamplesConfig), event.job)
        if isinstance(event, Evaluated) and ctx.runtime.rank == 0:
            from pegbox_samples.generation import write_samples

            write_samples(ctx, ctx.section(SamplesConfig), event.model, event.step, self._prompts)
