"""What both programs are given, and what ours left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "model_name_or_path": "tiny",
    "dataset_name": "rows",
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "train_sampling_strategy": "sequential",
    "max_steps": 5,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
}


def logged(kind: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in Path("ours/metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]
