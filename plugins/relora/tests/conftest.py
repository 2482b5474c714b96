"""Whole runs of a tiny Llama on the CPU with an adapter that is begun anew."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox.context import Context
from pegbox.plan import compose
from pegbox.run import execute
from pegbox.testing.tiny import tiny_model
from pegbox.types import Model

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


Train = Callable[..., tuple[Context, Model]]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Runs the engine: the context and the model as it was exported; `train({"every": 4}, steps=12)`."""

    def run(relora: dict[str, Any] | None = None, steps: int = 12, **keys: Any) -> tuple[Context, Model]:
        from tiny_restarts import Tiny

        tiny, others = Tiny(keys.pop("make", tiny_model)), keys.pop("instances", {})
        written = {
            "model": {"name": "tiny"},
            "output": str(tmp_path / keys.pop("output", "run")),
            "plugins": keys.pop("plugins", ["tiny", "lora", "relora", *others, "sft", "adamw", "trainer"]),
            "lora": {"r": 2, "alpha": 4, "targets": ["q_proj", "up_proj"], **keys.pop("lora", {})},
            "relora": {"every": 4, "warmup_steps": 2, **(relora or {})},
            "trainer": {
                "max_steps": steps,
                "shuffle": False,
                "max_grad_norm": None,
                "progress": "none",
                "device": "cpu",
                "save_every": None,
                **keys.pop("trainer", {}),
            },
            **keys,
        }
        if "adamw" in written["plugins"]:
            written["adamw"] = {"learning_rate": 1e-2, "weight_decay": 0.1, "fused": False, **keys.get("adamw", {})}
        ctx = compose(written, instances={"tiny": tiny, **others})
        execute(ctx)
        assert tiny.model is not None
        return ctx, tiny.model

    return run
