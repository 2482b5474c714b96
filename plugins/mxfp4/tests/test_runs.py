"""Whole runs on packed experts: trained, stopped, gone on with, exported, and opened by PEFT on the unpacked model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packed_checkpoints import EXPERTS, folder
from pegbox.errors import ConfigError
from pegbox.events import Event, RunStarted, Signal, Stepped
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.rows import Examples
from pegbox.run import execute
from pegbox.testing.tiny import TinyExamples
from pegbox.types import Model
from pegbox_mxfp4.experts import PARTS, experts_of
from pegbox_mxfp4.weight import PackedWeight
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, Mxfp4Config, PreTrainedTokenizerFast

IDS = torch.arange(3, 27).reshape(2, 12)


class Rows:
    """The training rows; asks the run to stop after a step, and keeps the model in view."""

    def __init__(self, stop: int) -> None:
        self.stop = stop
        self.model: Model | None = None

    @hookimpl
    def build_dataset(self, split: str) -> Examples | None:
        source = random.Random(0)
        letters = [chr(number) for number in range(1, 60)]
        texts = ["".join(source.choices(letters, k=source.randint(5, 12))) for _ in range(16)]
        return TinyExamples(texts) if split == "train" else None

    @hookimpl
    def on_event(self, event: Event) -> Signal | None:
        if isinstance(event, RunStarted):
            self.model = event.job.model
        return Signal.STOP if isinstance(event, Stepped) and event.step == self.stop else None


def run(output: Path, plugins: Sequence[str] = ("scattermoe",), stop: int = 99, **sections: Any) -> Any:
    """The trained network of a run of six steps; goes on if the folder holds a run."""
    name = folder("gpt_oss")
    words = Tokenizer(models.WordLevel({"<end>": 0, "word": 1}, unk_token="word"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>").save_pretrained(name)
    config = {
        "model": {"name": name, "dtype": "float32"},
        "output": str(output),
        "plugins": ["hf", "rows", "mxfp4", "lora", *plugins, "sft", "adamw", "trainer"],
        "lora": {"r": 4, "alpha": 8.0, "targets": ["q_proj"], "parameters": EXPERTS},
        "adamw": {"learning_rate": 1e-2},
        "trainer": {"max_steps": 6, "progress": "none", "device": "cpu", "precision": "fp32", "save_every": None},
        **({"resume": "auto"} if output.exists() else {}),
        **sections,
    }
    rows = Rows(stop)
    execute(compose(config, instances={"rows": rows}))
    assert rows.model is not None
    return rows.model.module


def test_a_run_trains_experts_and_peft_opens_its_adapter_on_the_unpacked_model(tmp_path: Path) -> None:
    module = run(tmp_path / "run", ["scattermoe", "activations", "chunked-cross-entropy"]).eval()
    assert all(isinstance(getattr(experts, part), PackedWeight) for _, experts in experts_of(module) for part in PARTS)
    base = AutoModelForCausalLM.from_pretrained(folder("gpt_oss"), quantization_config=Mxfp4Config(dequantize=True))
    base = base.float().eval()
    with torch.no_grad():
        before, after = base(IDS).logits, module(IDS).logits
        reopened = peft.PeftModel.from_pretrained(base, tmp_path / "run").float().eval()
        assert not torch.allclose(before, after, atol=1e-3)
        torch.testing.assert_close(reopened(IDS).logits, after, rtol=1e-4, atol=1e-3)


def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    run(tmp_path / "run", stop=2)
    resumed = run(tmp_path / "run")
    trained = [(name, p) for name, p in whole.named_parameters() if p.requires_grad]
    others = dict(resumed.named_parameters())
    assert trained
    assert all(torch.equal(p, others[name]) for name, p in trained)


def test_what_is_kept_can_be_offloaded(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    moved = run(
        tmp_path / "moved",
        ["scattermoe", "activations"],
        activations={"policy": "none", "offload": "cpu", "offload_min_bytes": 0},
    )
    for (name, one), other in zip(plain.named_parameters(), moved.parameters(), strict=True):
        assert not one.requires_grad or torch.equal(one, other), name


def test_adapters_on_packed_experts_without_scattermoe_stop_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Add scattermoe to plugins"):
        run(tmp_path / "run", [])
