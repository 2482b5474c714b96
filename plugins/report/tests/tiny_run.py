"""A plugin for tests: a tiny Llama and a few byte-encoded rows, so that a whole run takes a second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pegbox.hooks import hookimpl
from pegbox.testing.tiny import TinyExamples, tiny_model, tiny_processor
from pegbox.types import ExportRequest, Item, Model, Processor

TEXTS = ("one two three", "four five six seven", "eight nine", "ten eleven twelve")


class Plugin:
    """Owns what a run needs beyond sft, adamw and trainer."""

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        return [Item(kind=kind, name="transformers", target="tiny") for kind in ("model_format", "export_format")]

    @hookimpl
    def load_processor(self) -> Processor:
        return tiny_processor()

    @hookimpl
    def build_dataset(self, split: str) -> TinyExamples:
        return TinyExamples(TEXTS if split == "train" else TEXTS[:2], split)

    @hookimpl
    def load_model(self) -> Model:
        return tiny_model()

    @hookimpl
    def export_model(self, request: ExportRequest) -> Path:
        return request.folder
