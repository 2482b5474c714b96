"""Whole runs with each kind of adapter: every part of it is trained, and a stopped run goes on bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pegbox.events import Event, Signal, Stepped
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.rows import Examples
from pegbox.run import execute
from pegbox.testing.tiny import TinyExamples, tiny_model
from pegbox.types import Item, Model, Processor
from tiny_mixtures import EXPERTS, mixture
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

IDS = torch.arange(24).reshape(2, 12)


class Tiny:
    """Owns what a run needs beyond the packages under test."""

    def __init__(self, make: Callable[[], nn.Module] | None = None, **changes: Any) -> None:
        self.make, self.changes = make, changes
        self.module: nn.Module | None = None

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        return [Item(kind="model_format", name="transformers", target="tiny")]

    @hookimpl
    def load_processor(self) -> Processor:
        words = Tokenizer(models.WordLevel({"<end>": 0, "word": 1}, unk_token="word"))
        return Processor(tokenizer=PreTrainedTokenizerFast(tokenizer_object=words), pad_id=0, fingerprint="tiny")

    @hookimpl
    def build_dataset(self, split: str) -> Examples | None:
        source = random.Random(0)
        letters = [chr(number) for number in range(1, 60)]
        texts = ["".join(source.choices(letters, k=source.randint(5, 12))) for _ in range(16)]
        return Rows(texts) if split == "train" else None

    @hookimpl
    def load_model(self) -> Model:
        from dataclasses import replace

        model = tiny_model(**self.changes)
        model = model if self.make is None else replace(model, module=self.make())
        self.module = model.module
        return model


class Rows(TinyExamples):
    """Without the end token, whose id a small vocabulary has not."""

    def __getitem__(self, index: int) -> Any:
        from dataclasses import replace

        example = super().__getitem__(index)
        return replace(example, input_ids=example.input_ids[:-1], labels=example.labels[:-1])


class StopAt:
    """Asks the run to stop after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    @hookimpl
    def on_event(self, event: Event) -> Signal | None:
        return Signal.STOP if isinstance(event, Stepped) and event.step == self.step else None


def run(folder: Path, tiny: Tiny, stop: int = 99, **lora: Any) -> nn.Module:
    """The trained network of a run of eight steps; goes on if the folder holds a run."""
    config = {
        "model": {"name": "tiny"},
        "output": str(folder),
        "plugins": ["tiny", "stop", "lora", "sft", "adamw", "trainer"],
        "lora": {"r": 4, "alpha": 8, **lora},
        "adamw": {"learning_rate": 1e-2},
        "trainer": {"max_steps": 8, "progress": "none", "device": "cpu", "save_every": None},
        **({"resume": "auto"} if folder.exists() else {}),
    }
    execute(compose(config, instances={"tiny": tiny, "stop": StopAt(stop)}))
    assert tiny.module is not None
    return tiny.module


@pytest.mark.parametrize(
    ("lora", "tiny"),
    [
        ({}, Tiny()),
        ({"use_dora": True, "use_rslora": True, "lr_ratio": 16.0}, Tiny()),
        ({"init": "orthogonal"}, Tiny()),
        ({"init": "olora"}, Tiny()),
        ({"init": "eva"}, Tiny()),
        ({"init": "corda", "use_rslora": True}, Tiny()),
        ({"init": "lora_ga"}, Tiny()),
        ({"targets": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]}, Tiny(tie_word_embeddings=True)),
        ({"targets": ["q_proj"], "tokens": ["word", 59, 200]}, Tiny()),
        ({"targets": ["q_proj"], "tokens": [3], "token_modules": ["embed_tokens", "lm_head"]}, Tiny()),
        ({"targets": ["q_proj", "embed_tokens"], "embedding_lr": 1e-3, "lr_ratio": 2.0}, Tiny()),
        ({"targets": ["q_proj"], "bias": "lora_only"}, Tiny(attention_bias=True)),
        ({"targets": ["q_proj"], "parameters": EXPERTS}, Tiny(lambda: mixture("gpt-oss"))),
        ({"targets": ["q_proj"], "parameters": EXPERTS}, Tiny(lambda: mixture("qwen3"))),
    ],
)
def test_every_part_of_a_sound_adapter_is_trained(lora: dict, tiny: Tiny, tmp_path: Path) -> None:
    """The trainer's proof of gradients raises no false alarm, and the export is the trained function."""
    module = run(tmp_path / "run", tiny, **lora).eval()
    fresh = (tiny.make() if tiny.make else tiny_model(**tiny.changes).module).eval()
    ids = IDS % 60
    with torch.no_grad():
        before, after = fresh(ids).logits, module(ids).logits
        assert not torch.allclose(before, after, atol=1e-3)
        reopened = peft.PeftModel.from_pretrained(fresh, tmp_path / "run").eval()
        torch.testing.assert_close(reopened(ids).logits, after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "lora",
    [
        {"dropout": 0.1, "use_dora": True},
        {"init": "pissa"},
        {"init": "pissa_niter_4"},
        {"init": "eva"},
        {"init": "corda"},
        {"init": "lora_ga"},
        {"targets": ["q_proj"], "tokens": [3], "modules_to_save": ["norm"]},
    ],
)
def test_a_stopped_run_goes_on_with_the_same_bits(lora: dict, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Tiny(), **lora)
    run(tmp_path / "run", Tiny(), stop=3, **lora)
    resumed = run(tmp_path / "run", Tiny(), **lora)
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
