"""A plugin for tests that looks on and changes nothing."""

from __future__ import annotations

from pegbox.events import Event
from pegbox.hooks import hookimpl


class Plugin:
    @hookimpl
    def on_event(self, event: Event) -> None:
        assert event is not None
