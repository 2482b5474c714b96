"""The plugin keeps the contract of plugins."""

from __future__ import annotations

from pegbox.testing import PluginConformance


class TestTorchaoOptim(PluginConformance):
    plugin = "torchao-optim"
