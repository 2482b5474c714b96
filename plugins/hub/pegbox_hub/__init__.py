"""Pushing a finished run to a hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox.events import Event, RunBegins, RunEnded
from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context


class HubPlugin:
    """Checks the login before anything is loaded, and pushes what was exported when the run has ended."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_hub.config import HubConfig

        return ConfigSection(schema=HubConfig)

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        if isinstance(event, RunBegins):
            from pegbox_hub.config import HubConfig
            from pegbox_hub.push import require_login

            require_login(ctx.section(HubConfig))
        if isinstance(event, RunEnded) and event.outcome.reason != "interrupted" and ctx.runtime.rank == 0:
            from pegbox_hub.config import HubConfig
            from pegbox_hub.push import push

            address = push(ctx.section(HubConfig), event.folder, event.outcome.step)
            print(f"pushed to {address}", flush=True)
