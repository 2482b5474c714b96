"""A run's folder as the trainer writes it, with figures that look like those of a real run."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

CONFIG = [
    ("model.name", "HuggingFaceTB/SmolLM2-135M-Instruct", "train.yaml:1"),
    ("model.revision", None, "default"),
    ("model.dtype", "auto", "default"),
    ("plugins", ["hf", "data", "packing", "lora", "sft", "optim", "trainer"], "train.yaml:2"),
    ("output", "runs/support-bot", "command line"),
    ("seed", 0, "default"),
    ("lora.r", 16, "train.yaml:6"),
    ("lora.alpha", 32.0, "train.yaml:6"),
    ("lora.targets", "all-linear", "default"),
    ("data.train", [{"path": "data/train.jsonl", "format": "chat"}], "train.yaml:4"),
    ("trainer.max_steps", 400, "train.yaml:9"),
    ("trainer.micro_batch", 8, "recipe sft-lora"),
    ("trainer.max_grad_norm", 1.0, "default"),
    ("optim.learning_rate", 0.0002, "train.yaml:7"),
]
HOOKS = [
    ("build_runtime", ["trainer"], [], "the only one"),
    ("load_processor", ["hf"], [], "the only one"),
    ("build_dataset", ["data"], ["packing"], "the only one"),
    ("load_model", ["hf"], [], "the only one"),
    ("apply_adapters", ["lora"], [], "the only one"),
    ("place_model", ["trainer"], [], "chosen by use"),
    ("build_loss", ["sft"], [], "the only one"),
    ("build_optimizer", ["optim"], [], "the only one"),
    ("run_training", ["trainer"], [], "the only one"),
    ("on_event", ["trainer", "trackers"], [], "all observe, in list order"),
]
PROMPTS = {
    "My order 1182 has not arrived. What can I do?": [
        (100, "I am sorry to hear that. Please wait."),
        (
            400,
            "I am sorry that order 1182 is late. It left our warehouse on Monday; you can follow it in your account.",
        ),
    ],
    "Translate to German: The meeting was moved to Thursday.": [
        (100, "Das Treffen war bewegt."),
        (400, "Die Besprechung wurde auf Donnerstag verschoben."),
    ],
}


def metrics(steps: int = 400, every: int = 2) -> list[dict[str, Any]]:
    noise, rows = random.Random(0), []
    for step in range(every, steps + 1, every):
        warm = min(1.0, step / 40)
        rows.append(
            {
                "kind": "train",
                "step": step,
                "loss": 0.9 + 1.4 * math.exp(-step / 70) + noise.gauss(0, 0.06),
                "grad_norm": 0.8 + 2.4 * math.exp(-step / 30) + abs(noise.gauss(0, 0.25)) + (14 if step == 212 else 0),
                "learning_rate": 2e-4 * warm * 0.5 * (1 + math.cos(math.pi * step / steps)),
                "trained_tokens": step * 6100,
                "tokens_per_s": 18200 + noise.gauss(0, 420) - (3500 if step in (100, 102) else 0),
                "elapsed_s": step * 1.14,
                "peak_memory_bytes": int(2**30 * (7.2 + 0.6 * min(1, step / 60))),
                "epoch": step / 160,
            }
        )
        if step % 50 == 0:
            rows.append({"kind": "eval", "step": step, "eval_loss": 1.02 + 1.1 * math.exp(-step / 90)})
    return rows


def write_run(folder: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
    """Write the folder; `changes` replace parts of run.json."""
    folder.mkdir(parents=True)
    record = {
        "plan": {
            "pegbox": "0.1.0",
            "plugins": [{"name": name, "from": f"pegbox-{name} 0.1.0"} for name in CONFIG[3][1]],
            "hooks": [dict(zip(("hook", "plugins", "wrappers", "reason"), job, strict=True)) for job in HOOKS],
            "config": [{"key": key, "value": value, "from": origin} for key, value, origin in CONFIG],
        },
        "digest": "5c1f0e7a90b24c63",
        "versions": {"python": "3.11.7", "pegbox-core": "0.1.0", "torch": "2.13.0", "transformers": "5.17.0"},
        "data": {
            "train": {"rows": 12834, "fingerprint": "9f2b77c41a0de5f8"},
            "eval": {"rows": 512, "fingerprint": "11c0aa5be27d9034"},
        },
        "processor": "e07c4f1d22b86a95",
        "world_size": 2,
        "command": ["pegbox", "run", "train.yaml", "output=runs/support-bot"],
        "started": "2026-03-02T09:14:03+00:00",
        "ended": "2026-03-02T09:21:47+00:00",
        "outcome": {"reason": "finished", "step": 400, "metrics": {}},
    }
    (folder / "run.json").write_text(json.dumps({**record, **changes}))
    lines = metrics() if rows is None else rows
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (folder / "samples").mkdir()
    for step in (100, 400):
        found = [
            {"step": at, "prompt": p, "completion": c} for p, all_ in PROMPTS.items() for at, c in all_ if at == step
        ]
        (folder / "samples" / f"step-{step:08d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    for step in (300, 400):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(bytes(3_400_000))
    (folder / "merged").mkdir()
    merged = {"status": "checked", "dtype": "bfloat16", "check": {"kl": 0.00031}}
    (folder / "merged" / "merge.json").write_text(json.dumps(merged))
    return folder
