"""The plugin keeps the contract of plugins; its patches need adapters, see test_patch_contract.py."""

from __future__ import annotations

from pegbox.testing import PluginConformance


class TestLoraKernels(PluginConformance):
    plugin = "lora-kernels"
