"""The plugin keeps the contract of plugins and losses."""

from __future__ import annotations

from pegbox.testing import LossConformance, PluginConformance


class TestDft(PluginConformance, LossConformance):
    plugin = "dft"
