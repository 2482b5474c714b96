"""The plugin keeps the contract of plugins."""

from __future__ import annotations

from typing import ClassVar

from pegbox.testing import PluginConformance


class TestRolloutVllm(PluginConformance):
    plugin = "rollout-vllm"
    config: ClassVar = {"url": "http://127.0.0.1:8000"}
