"""The plugin keeps the contract of plugins and of patches; one that needs hf is in test_patch_contract.py."""

from __future__ import annotations

from typing import ClassVar

from pegbox.testing import PatchConformance, PluginConformance


class TestAttention(PluginConformance, PatchConformance):
    plugin = "attention"
    config: ClassVar = {"implementation": "sdpa"}
