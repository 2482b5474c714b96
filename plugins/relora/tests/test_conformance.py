from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import peft
import torch
from pegbox.context import Context
from pegbox.testing import PluginConformance, WrapperConformance
from pegbox.types import Optimization


class TestRelora(PluginConformance, WrapperConformance):
    plugin = "relora"
    config: ClassVar = {"every": 100}

    def arguments(self, ctx: Context) -> dict[str, Any]:
        ctx.total_steps = 1000
        return {**super().arguments(ctx), "model": self.model()}

    def result(self, hook: str) -> Any:
        model = self.model()
        if hook == "apply_adapters":
            peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model.module)
            return model
        if hook == "build_optimizer":
            optimizer = torch.optim.SGD(model.module.parameters())
            schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
            return Optimization(optimizer=optimizer, schedule=schedule)
        return Path("folder")
