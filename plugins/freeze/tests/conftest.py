"""Whole runs of a tiny Llama on the CPU, with this plugin or without."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.rows import Examples
from pegbox.run import execute
from pegbox.testing.tiny import TinyExamples, tiny_model
from pegbox.types import ExportRequest, Item, Model, Processor


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Tiny:
    """Owns what a run needs beyond the packages under test."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes
        self.model: Model | None = None

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        return [Item(kind=kind, name="transformers", target="tiny") for kind in ("model_format", "export_format")]

    @hookimpl
    def load_processor(self) -> Processor:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({"<end>": 0, "word": 7, "<unk>": 1}, unk_token="<unk>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
        return Processor(tokenizer=tokenizer, pad_id=256, fingerprint="tiny")

    @hookimpl
    def build_dataset(self, split: str) -> Examples | None:
        source = random.Random(0)
        texts = ["".join(source.choices("abcdef gh", k=source.randint(5, 12))) for _ in range(16)]
        return TinyExamples(texts) if split == "train" else None

    @hookimpl
    def load_model(self) -> Model:
        self.model = tiny_model(**self.changes)
        return self.model

    @hookimpl
    def export_model(self, model: Model, request: ExportRequest) -> Path:
        model.module.save_pretrained(request.folder)
        return request.folder


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Model]:
    """Runs the engine and returns the trained model: `train(freeze={...}, steps=3)`."""

    def run(freeze: dict[str, Any] | None = None, steps: int = 4, **keys: Any) -> Model:
        tiny = Tiny(**keys.pop("changes", {}))
        others = keys.pop("instances", {})
        written = {
            "model": {"name": "tiny"},
            "output": str(tmp_path / keys.pop("output", "run")),
            "plugins": ["tiny", *others, *(["freeze"] if freeze is not None else []), "sft", "adamw", "trainer"],
            "adamw": {"schedule": "constant", "learning_rate": 1e-2, "weight_decay": 0.1, **keys.pop("adamw", {})},
            "trainer": {"max_steps": steps, "progress": "none", "device": "cpu", **keys.pop("trainer", {})},
            **({"freeze": freeze} if freeze is not None else {}),
            **keys,
        }
        execute(compose(written, instances={"tiny": tiny, **others}))
        assert tiny.model is not None
        return tiny.model

    return run
