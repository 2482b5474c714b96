"""The plugin keeps the contract of plugins."""

from __future__ import annotations

from typing import ClassVar

from pegbox.testing import PluginConformance


class TestCce(PluginConformance):
    plugin = "cce"
    config: ClassVar = {"logits_gib": 1e-5}
