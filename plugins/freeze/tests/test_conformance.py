from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pegbox.context import Context
from pegbox.testing import PluginConformance, WrapperConformance
from pegbox.types import ModelRequest


class TestFreeze(PluginConformance, WrapperConformance):
    plugin = "freeze"
    config: ClassVar = {"freeze": ["norm"]}

    def arguments(self, ctx: Context) -> dict[str, Any]:
        request = ModelRequest(name="tiny", format="transformers")
        return {**super().arguments(ctx), "request": request, "model": self.model()}

    def result(self, hook: str) -> Any:
        return Path("folder") if hook == "export_model" else super().result(hook)
