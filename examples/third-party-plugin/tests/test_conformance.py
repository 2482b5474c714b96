"""The rules that every plugin keeps, inherited from the core."""

from pegbox.testing import PluginConformance


class TestCosineReward(PluginConformance):
    plugin = "cosine-reward"
