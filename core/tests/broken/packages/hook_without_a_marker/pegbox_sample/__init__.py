"""A method is named like a hook, and is never called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pegbox.hooks import hookimpl
from pegbox.types import Item

if TYPE_CHECKING:
    from pegbox.events import Event


class SamplePlugin:
    """The marker of on_event was forgotten."""

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        return []

    def on_event(self, event: Event) -> None:
        """Nothing."""
