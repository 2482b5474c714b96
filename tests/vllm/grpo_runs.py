"""Whole runs of GRPO on a small model, which is paid for even tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pegbox.events import Event, Stepped
from pegbox.hooks import hookimpl
from pegbox.rollouts import RolloutBatch, Score

STEPS = 8


class Rewarding:
    """Rewards even tokens; does something right after a step."""

    def __init__(self, after: int = 0, do: Callable[[], None] = lambda: None) -> None:
        self._after, self._do = after, do

    @hookimpl
    def score_rollouts(self, rollouts: RolloutBatch) -> Sequence[Score]:
        share = (sum(token % 2 == 0 for token in one.completion) / len(one.completion) for one in rollouts.rollouts)
        return [Score(name="even", values_R=tuple(share))]

    @hookimpl
    def on_event(self, event: Event) -> None:
        if isinstance(event, Stepped) and event.step == self._after:
            self._do()


def run(
    folder: Path, base: Path, rewarding: Rewarding, resume: str | None = None, *, lora: bool = True, **section: Any
) -> Any:
    """Train `base` with GRPO, by an adapter or in full; returns the outcome."""
    from pegbox.plan import compose
    from pegbox.run import execute

    folder.mkdir(exist_ok=True)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"w{5 + row} w6 w7"}) + "\n" for row in range(64)), encoding="utf-8")
    config = {
        "model": {"name": str(base), "dtype": "float32"},
        "plugins": ["hf", "data", *(["lora"] if lora else []), "rewarding", "grpo", "adamw", "trainer", "rollout-vllm"],
        "data": {"train": [{"path": str(rows), "format": "prompts", "options": {"chat_template": False}}]},
        **({"lora": {"r": 4, "alpha": 8}} if lora else {}),
        "grpo": {"samples": 16, "max_completion_length": 4},
        "adamw": {"learning_rate": 3e-2 if lora else 3e-3, "schedule": "constant"},
        "trainer": {
            "max_steps": STEPS,
            "batch": 4,
            "micro_batch": 4,
            "log_every": 1,
            "save_every": 1,
            "precision": "fp32",
            "progress": "none",
        },
        "rollout-vllm": section,
        "output": str(folder / "run"),
    }
    overrides = [f"resume={resume}"] if resume else []
    return execute(compose(config, overrides, instances={"rewarding": rewarding}))


def rewards(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    return [line["reward"] for line in lines if line.get("kind") == "train"]
