"""The plugin keeps the contract of plugins and of patches."""

from __future__ import annotations

from typing import ClassVar

from pegbox.testing import PatchConformance, PluginConformance


class TestFused(PluginConformance, PatchConformance):
    plugin = "fused"


class TestRope(PatchConformance):
    plugin = "fused"
    config: ClassVar = {"rope": True, "norm": False, "mlp": False, "experts": False}
