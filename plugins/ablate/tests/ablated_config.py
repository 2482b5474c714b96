"""The config of a tiny run, which tests leave plugins out of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def tiny(*plugins: str) -> dict[str, Any]:
    """A config of a run on the CPU: the plugins beside this file, and what trains them."""
    return {
        "model": {"name": "plain"},
        "plugins": [*(str(HERE / f"{name}.py") for name in ("tiny_run", *plugins)), "sft", "trainer"],
        "trainer": {"max_steps": 30, "micro_batch": 2, "device": "cpu", "progress": "none"},
    }
