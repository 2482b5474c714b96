"""The plugin keeps the contract of plugins. Its patches need a GPU; test_liger.py has what holds without one."""

from __future__ import annotations

from pegbox.testing import PluginConformance


class TestLiger(PluginConformance):
    plugin = "liger"
