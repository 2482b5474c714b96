from __future__ import annotations

from typing import Any, ClassVar

from pegbox.testing import PluginConformance


class TestTrackers(PluginConformance):
    plugin = "trackers"
    config: ClassVar[dict[str, Any]] = {"tensorboard": {}}
