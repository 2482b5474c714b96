"""The plugin keeps the contract of plugins, and its loss that of losses."""

from __future__ import annotations

from pegbox.testing import LossConformance, PluginConformance


class TestSft(PluginConformance, LossConformance):
    plugin = "sft"
