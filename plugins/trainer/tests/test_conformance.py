"""The plugin keeps the contract of plugins, and its store that of checkpoint stores."""

from __future__ import annotations

from pegbox.testing import CheckpointConformance, PluginConformance


class TestTrainer(PluginConformance, CheckpointConformance):
    plugin = "trainer"
