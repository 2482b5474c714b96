"""Tiny runs: their configs, how they are started, and what is compared afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
TINY = str(HERE / "tiny_llama.py")
WALL_CLOCK = {"elapsed_s", "tokens_per_s", "peak_memory_bytes"}


def tiny_config(folder: Path, **keys: Any) -> dict[str, Any]:
    """A config: `tiny`, `adamw`, `plugins` (further ones) and keys of the core; the rest are the trainer's settings."""
    core = {key: keys.pop(key) for key in ("resume", "seed") if key in keys}
    sections = {"tiny_llama": keys.pop("tiny", {}), "adamw": keys.pop("adamw", {})}
    plugins = [TINY, "sft", "adamw", "trainer", *keys.pop("plugins", ())]
    trainer = {"progress": "none", "log_every": 1, "save_every": None, **keys}
    return {
        "model": {"name": "tiny"},
        "plugins": plugins,
        "output": str(folder),
        **sections,
        "trainer": trainer,
        **core,
    }


def run(config: Mapping[str, Any], **instances: object) -> Any:
    """Run a config in this process, with ready plugins by name; returns the outcome."""
    from pegbox.plan import compose
    from pegbox.run import execute

    return execute(compose(config, instances=instances))


def in_subprocess(*arguments: str, timeout_s: float = 240) -> str:
    """Run Python with one thread; returns what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def records(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """`metrics.jsonl` without the fields that tell the time."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    parsed = [{k: v for k, v in json.loads(line).items() if k not in WALL_CLOCK} for line in lines]
    return [record for record in parsed if kind in (None, record["kind"])]


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def assert_same_run(left: Path, right: Path, step: int) -> None:
    """Weights, optimizer, schedule, states, random generators and metrics of two runs are bit-identical."""
    assert records(left) == records(right)
    a, b = checkpoint(left, step), checkpoint(right, step)
    assert_same_tree(load_file(a / "model.safetensors"), load_file(b / "model.safetensors"))
    files = sorted(path.relative_to(a) for path in a.rglob("*.pt"))
    assert files == sorted(path.relative_to(b) for path in b.rglob("*.pt"))
    for file in files:
        states = [torch.load(folder / file, weights_only=True) for folder in (a, b)]
        for state in states if "loop" in file.name else ():
            # The wall clock; the digits of its figures also change how long the metrics file is.
            del state["meter"]["elapsed_s"], state["metrics_bytes"]
            state["latest"] = {k: v for k, v in state["latest"].items() if k not in WALL_CLOCK}
        assert_same_tree(*states, place=str(file))


def assert_same_tree(left: object, right: object, place: str = "") -> None:
    """Equal to the bit, whatever holds the tensors."""
    if isinstance(left, torch.Tensor):
        assert isinstance(right, torch.Tensor)
        assert left.dtype == right.dtype
        assert torch.equal(left, right), place
    elif isinstance(left, Mapping):
        assert isinstance(right, Mapping)
        assert list(left) == list(right), place
        for key in left:
            assert_same_tree(left[key], right[key], f"{place}/{key}")
    elif isinstance(left, list | tuple):
        assert isinstance(right, list | tuple)
        assert len(left) == len(right), place
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same_tree(a, b, f"{place}/{index}")
    else:
        assert left == right, place
