"""The plugins keep the contract of plugins."""

from __future__ import annotations

import pytest
from pegbox.testing import PluginConformance


class TestOptim(PluginConformance):
    plugin = "optim"


class TestAdamw(PluginConformance):
    plugin = "adamw"

    @pytest.mark.xfail(reason="adamw is the short way into pegbox-optim, which brings both", strict=True)
    def test_it_has_one_name(self) -> None:
        super().test_it_has_one_name()
