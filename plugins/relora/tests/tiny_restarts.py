"""A tiny Llama and rows for it: what a run needs beyond the packages under test."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from pegbox.hooks import hookimpl
from pegbox.rows import Examples
from pegbox.testing.tiny import TinyExamples, tiny_model
from pegbox.types import ExportRequest, Item, Model, Processor

ROWS = 16


def texts() -> list[str]:
    """Rows of different length."""
    source = random.Random(0)
    return ["".join(source.choices("abcdef gh", k=source.randint(5, 12))) for _ in range(ROWS)]


class Tiny:
    """Owns what a run needs beyond the packages under test."""

    def __init__(self, make: Callable[[], Model] = tiny_model) -> None:
        self.make = make
        self.model: Model | None = None

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        return [Item(kind=kind, name="transformers", target="tiny") for kind in ("model_format", "export_format")]

    @hookimpl
    def load_processor(self) -> Processor:
        return Processor(tokenizer=None, pad_id=256, fingerprint="tiny")

    @hookimpl
    def build_dataset(self, split: str) -> Examples | None:
        return TinyExamples(texts()) if split == "train" else None

    @hookimpl
    def load_model(self) -> Model:
        self.model = self.make()
        return self.model

    @hookimpl
    def export_model(self, model: Model, request: ExportRequest) -> Path:
        model.module.save_pretrained(request.folder)
        return request.folder
