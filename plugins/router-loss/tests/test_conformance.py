from __future__ import annotations

from pegbox.testing import PluginConformance


class TestRouterLoss(PluginConformance):
    plugin = "router-loss"
