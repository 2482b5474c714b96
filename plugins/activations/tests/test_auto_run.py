"""A whole run under `auto`, with the training loop: the same losses as without the plugin, whatever was chosen."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from pegbox.hooks import hookimpl
from pegbox.rows import Example
from pegbox.testing import run_config
from pegbox.testing.tiny import tiny_model
from pegbox.types import Item, Model, Processor

LAYERS, STEPS = 4, 8


class Rows:
    """Random rows of unlike length."""

    split, fingerprint = "train", "random rows"

    def __init__(self) -> None:
        source = random.Random(0)
        self._rows = [[source.randint(1, 250) for _ in range(source.randint(4, 40))] for _ in range(32)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return Example(input_ids=self._rows[index], labels=self._rows[index])

    def describe(self, index: int) -> str:
        return f"row {index}"


class Source:
    """Owns the model and the data of a run; nothing is exported."""

    @hookimpl
    def register_items(self) -> list[Item]:
        kinds = ("model_format", "export_format")
        return [Item(kind=kind, name="transformers", target="nothing is written") for kind in kinds]

    @hookimpl
    def load_processor(self) -> Processor:
        return Processor(tokenizer=None, pad_id=0, fingerprint="none")  # type: ignore[arg-type]

    @hookimpl
    def build_dataset(self, split: str) -> Any:
        return Rows() if split == "train" else None

    @hookimpl
    def load_model(self) -> Model:
        return tiny_model(num_hidden_layers=LAYERS)

    @hookimpl
    def export_model(self, request: Any) -> Path:
        return request.folder  # type: ignore[no-any-return]


def run(folder: Path, **settings: Any) -> tuple[list[float], Path]:
    """The losses of a run, and its folder."""
    trainer = {"micro_batch": 2, "accumulation": 2, "max_steps": STEPS, "log_every": 1, "device": "cpu"}
    done = run_config(
        {
            "model": {"name": "tiny"},
            "plugins": ["source", *(["activations"] if settings else []), "sft", "adamw", "trainer"],
            "output": str(folder),
            "trainer": {**trainer, "save_every": None, "progress": "none"},
            **({"activations": settings} if settings else {}),
        },
        instances={"source": Source()},
    )
    lines = (done.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines], done.folder


@pytest.mark.parametrize(("gib", "whole"), [(1.0, LAYERS), (1e-6, 0)])
def test_a_run_has_the_losses_of_one_without_the_plugin(tmp_path: Path, gib: float, whole: int) -> None:
    pytest.importorskip("pegbox_trainer")
    expected, _ = run(tmp_path / "plain")
    losses, folder = run(tmp_path / "auto", policy="auto", memory_gib=gib)
    assert losses == expected
    content = json.loads((folder / "activations.json").read_text())
    assert content["keep_everything"] == whole
    assert content["layers"] == LAYERS
