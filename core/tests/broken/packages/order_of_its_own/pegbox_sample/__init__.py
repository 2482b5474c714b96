"""An implementation wants to be called first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox.hooks import hookimpl

if TYPE_CHECKING:
    from pegbox.events import Event


class SamplePlugin:
    """The order of calls is the order of the config's list."""

    @hookimpl(tryfirst=True)
    def on_event(self, event: Event) -> None:
        """Nothing."""
