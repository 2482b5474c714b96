"""A tiny model on disk, answers in steps with verdicts, and runs on them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox.events import Event, RunStarted, Signal, Stepped
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.rows import Examples
from pegbox.run import execute
from pegbox.testing.tiny import tiny_model
from pegbox.types import Model

sys.path.insert(0, str(Path(__file__).parent))

PAD, END = 256, 258


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny language model, with a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model") / "base"
    tiny_model().module.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(260)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token=f"t{PAD}", eos_token=f"t{END}").save_pretrained(folder)
    return folder


class Rows:
    """Owns `build_dataset`; stops the run at a step, and keeps the model in view."""

    def __init__(self, stop: int | None = None, last_only: bool = False) -> None:
        self.stop, self.last_only = stop, last_only
        self.model: Model | None = None

    @hookimpl
    def build_dataset(self, split: str) -> Examples:
        from tiny_steps import Steps

        return Steps(split, 12 if split == "train" else 4, self.last_only)

    @hookimpl
    def on_event(self, event: Event) -> Signal | None:
        if isinstance(event, RunStarted):
            self.model = event.job.model
        return Signal.STOP if isinstance(event, Stepped) and event.step == self.stop else None


@dataclass(frozen=True)
class Trained:
    """A run that ended."""

    model: Model
    folder: Path
    metrics: dict[str, float]

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.model.module.named_parameters() if p.requires_grad}


@pytest.fixture
def train(base: Path, tmp_path: Path) -> Callable[..., Trained]:
    """Runs six steps: `train("name", prm={...}, plugins=["packing"], packing={...})`; goes on if it exists."""

    def run(
        name: str, stop: int | None = None, plugins: Sequence[str] = (), last_only: bool = False, **sections: Any
    ) -> Trained:
        rows, folder = Rows(stop, last_only), tmp_path / name
        trainer = {"max_steps": 6, "micro_batch": 4, "progress": "none", "device": "cpu", "save_every": None}
        config = {
            "model": {"name": str(base)},
            "output": str(folder),
            "plugins": ["hf", "rows", *plugins, "prm", "adamw", "trainer"],
            # A large eps: steps in proportion to gradients, so that rounding of tiny ones is not blown up.
            "adamw": {"learning_rate": 1e-2, "eps": 1e-3},
            **sections,
            "trainer": {**trainer, **sections.get("trainer", {})},
            **({"resume": "auto"} if folder.exists() else {}),
        }
        outcome = execute(compose(config, instances={"rows": rows}))
        assert rows.model is not None
        return Trained(rows.model, folder, dict(outcome.metrics))

    return run
