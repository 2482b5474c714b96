"""The plugin keeps the contract of plugins and wrappers."""

from __future__ import annotations

from typing import Any

from pegbox.testing import PluginConformance, WrapperConformance
from pegbox.testing.tiny import tiny_model
from pegbox.types import Outcome


class TestScheduleFree(PluginConformance, WrapperConformance):
    plugin = "schedule-free"

    def result(self, hook: str) -> Any:
        return tiny_model(placed=True) if hook == "place_model" else Outcome(reason="finished", step=1)
