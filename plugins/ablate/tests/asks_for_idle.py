"""A plugin for tests whose run is refused without the plugin `idle`."""

from __future__ import annotations

from pegbox.errors import ConfigError
from pegbox.events import Event, RunBegins
from pegbox.hooks import hookimpl


class Plugin:
    @hookimpl
    def on_event(self, ctx, event: Event) -> None:
        if isinstance(event, RunBegins) and "idle" not in ctx.kernel.active:
            raise ConfigError("idle is not there, and somebody asks for it")
