"""The plugin keeps the contract of plugins, scorers and wrappers."""

from __future__ import annotations

from pegbox.testing import PluginConformance, ScoreConformance, WrapperConformance


class TestRewardFunctions(PluginConformance, ScoreConformance, WrapperConformance):
    plugin = "reward-functions"
    config = {"functions": [{"use": "length", "options": {"max_tokens": 5}}]}  # noqa: RUF012
    named_by_config = True
