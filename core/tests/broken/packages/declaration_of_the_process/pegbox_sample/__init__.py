"""An item is named after the process."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pegbox.hooks import hookimpl
from pegbox.types import Item


class SamplePlugin:
    """Each rank would compose another plan."""

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        return [Item(kind="sample", name=f"of-{os.getpid()}", target=None)]
