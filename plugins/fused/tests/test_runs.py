"""Whole runs with adapters and recomputing: what is trained is what is trained without the plugin."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.rows import Examples
from pegbox.run import execute
from pegbox.testing.tiny import TinyExamples, tiny_model
from pegbox.types import Item, Model, Processor
from torch import nn

pytest.importorskip("pegbox_lora")


class Rows(TinyExamples):
    """Without the end token, whose id a small vocabulary has not."""

    def __getitem__(self, index: int) -> Any:
        example = super().__getitem__(index)
        return replace(example, input_ids=example.input_ids[:-1], labels=example.labels[:-1])


class Tiny:
    """Owns what a run needs beyond the packages under test: a tiny Llama and some rows."""

    module: nn.Module

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        return [Item(kind="model_format", name="transformers", target="tiny")]

    @hookimpl
    def load_processor(self) -> Processor:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

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
        model = tiny_model()
        self.module = model.module
        return model


def trained(folder: Path, plugins: list[str], **sections: dict) -> dict[str, torch.Tensor]:
    """The trained parameters of a run of four steps, by name."""
    tiny = Tiny()
    config = {
        "model": {"name": "tiny"},
        "output": str(folder),
        "plugins": ["tiny", *plugins, "sft", "adamw", "trainer"],
        "adamw": {"learning_rate": 1e-2},
        "trainer": {"max_steps": 4, "progress": "none", "device": "cpu", "save_every": None},
        **sections,
    }
    execute(compose(config, instances={"tiny": tiny}))
    return {name: p.detach().clone() for name, p in tiny.module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "lora",
    [{"targets": "all-linear"}, {"targets": ["gate_proj"], "modules_to_save": ["norm"]}],
)
def test_adapters_and_saved_norms_are_trained_as_without_it(lora: dict, tmp_path: Path) -> None:
    sections = {"lora": {"r": 4, "alpha": 8, **lora}, "activations": {"policy": "full"}}
    plain = trained(tmp_path / "plain", ["lora", "activations"], **sections)
    fused = trained(tmp_path / "fused", ["lora", "activations", "fused"], fused={"rope": True}, **sections)
    assert plain.keys() == fused.keys()
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4)
