"""The truth: a real run of the trainer on a CPU, its storages counted from the first step to the last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pegbox.events import Event, RunStarted, Stepped
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.rollouts import RolloutBatch, Score
from pegbox.rows import UNTRAINED, Example
from pegbox.run import execute
from pegbox.types import Item, Processor
from pegbox_memory.ledger import Ledger


class Rows:
    """Rows of one length, every token trained, or none: prompts."""

    split, fingerprint = "train", "rows of one length"

    def __init__(self, count: int, length: int, *, prompts: bool) -> None:
        self._count, self._ids = count, [1 + at % 500 for at in range(length)]
        self._labels = [UNTRAINED] * length if prompts else self._ids

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        return Example(input_ids=self._ids, labels=self._labels)

    def describe(self, index: int) -> str:
        return f"row {index}"


class Measuring:
    """Owns the data, and counts what lives while steps are made; the export is left out."""

    def __init__(self, length: int, export: str, *, online: bool) -> None:
        self._rows, self._export, self.ledger = Rows(64, length, prompts=online), export, Ledger()
        self._last = 0

    @hookimpl
    def register_items(self) -> list[Item]:
        return [Item(kind="export_format", name=self._export, target="nothing is written")]

    @hookimpl
    def load_processor(self) -> Processor:
        return Processor(tokenizer=None, pad_id=0, fingerprint="none")  # type: ignore[arg-type]

    @hookimpl
    def build_dataset(self, split: str) -> Any:
        return self._rows if split == "train" else None

    @hookimpl
    def export_model(self, request: Any) -> Path:
        return request.folder  # type: ignore[no-any-return]

    @hookimpl
    def score_rollouts(self, rollouts: RolloutBatch) -> list[Score]:
        return [Score(name="odd", values_R=tuple(float(at % 2) for at in range(len(rollouts.rollouts))))]

    @hookimpl
    def on_event(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            module = event.job.model.module
            self.ledger.note(dict.fromkeys([*module.parameters(), *module.buffers()]), "model")
            self._last = event.job.train.total_steps or 0
            self.ledger.__enter__()
        elif isinstance(event, Stepped) and event.step == self._last:
            self.ledger.__exit__(None, None, None)


def peak_of_run(config: Mapping[str, Any], length: int) -> int:
    """Bytes at the peak of a run of this config."""
    adapted = "lora" in config["plugins"]
    formats = ("peft", "transformers")
    measuring = Measuring(length, formats[0] if adapted else formats[1], online="grpo" in config["plugins"])
    plugins = ["measuring", *config["plugins"]]
    owned = {"load_processor": "measuring", f"export_model[{measuring._export}]": "measuring"}
    execute(compose({**config, "plugins": plugins, "use": owned}, instances={"measuring": measuring}))
    return measuring.ledger.peak_bytes
