"""Importing the plugin replaces a method of torch's Dropout, if torch is there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from pegbox.hooks import hookimpl
from pegbox.types import Item

if "torch" in sys.modules:
    original = sys.modules["torch"].nn.Dropout.forward

    def forward(self: Any, input: Any) -> Any:
        return original(self, input)

    sys.modules["torch"].nn.Dropout.forward = forward


class SamplePlugin:
    """Every Dropout of the process is changed, for ever."""

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        return []
