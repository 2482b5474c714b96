"""What a run collects is kept in the class."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pegbox.hooks import hookimpl

if TYPE_CHECKING:
    from pegbox.events import Event


class SamplePlugin:
    """Two runs in one process see each other's events."""

    seen: ClassVar[list[Event]] = []

    @hookimpl
    def on_event(self, event: Event) -> None:
        self.seen.append(event)
