"""The plugin keeps the contract of plugins, patches and wrappers."""

from __future__ import annotations

from pegbox.testing import PatchConformance, PluginConformance, WrapperConformance
from pegbox.testing.tiny import tiny_model
from pegbox.types import Model


class TestNeftune(PluginConformance, PatchConformance, WrapperConformance):
    plugin = "neftune"

    def result(self, hook: str) -> Model:
        return tiny_model(placed=True)
