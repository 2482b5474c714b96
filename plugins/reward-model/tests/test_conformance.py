"""The plugin keeps the contract of plugins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pegbox.testing import PluginConformance


class TestRewardModel(PluginConformance):
    plugin = "reward-model"
    config: ClassVar[Mapping[str, Any]] = {"models": [{"name": "judge"}]}
