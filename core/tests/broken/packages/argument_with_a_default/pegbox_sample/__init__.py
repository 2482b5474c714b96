"""An implementation gives an argument a default."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox.hooks import hookimpl

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.events import Event


class SamplePlugin:
    """pluggy 1.7 fills the default, 1.6 never did."""

    @hookimpl
    def on_event(self, ctx: Context, event: Event | None = None) -> None:
        """Nothing."""
