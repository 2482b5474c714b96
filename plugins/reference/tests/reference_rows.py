"""What a run needs beyond the packages under test: pairs as rows, a tiny model, a loss that notes what it sees."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pegbox.context import Context
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.rows import UNTRAINED, Batch, Example, Examples, Split
from pegbox.run import execute
from pegbox.testing.tiny import tiny_model
from pegbox.types import Item, Loss, LossOutput, Model, ModelRequest, Need, Outputs, Processor, Term
from torch import Tensor, nn


def pair(seed: int) -> Example:
    """A preference as one row of two documents of random ids."""
    source = random.Random(seed)
    prompt, chosen, rejected = (source.choices(range(1, 250), k=source.randint(1, 6)) for _ in range(3))
    untrained = [UNTRAINED] * len(prompt)
    return Example(
        input_ids=[*prompt, *chosen, *prompt, *rejected],
        labels=[*untrained, *chosen, *untrained, *rejected],
        documents=(len(prompt) + len(chosen), len(prompt) + len(rejected)),
        signs=(1, -1),
    )


class Rows:
    """Pairs as rows of a split (`pegbox.rows.Examples`)."""

    def __init__(self, seeds: Sequence[int], split: Split = "train") -> None:
        self.split, self.fingerprint = split, f"{split} {list(seeds)}"
        self._examples = [pair(seed) for seed in seeds]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def describe(self, index: int) -> str:
        return f"pair {index}"


class Tiny:
    """Owns the model, the processor and the rows; counts forwards of every model it loads."""

    def __init__(self, train: Sequence[int] = range(10), held_out: Sequence[int] = (), **changes: Any) -> None:
        self.seeds = {"train": train, "eval": held_out}
        self.changes = {"initializer_range": 0.1, **changes}
        self.loaded: list[Model] = []
        self.forwards = 0
        self.fails_at: int | None = None

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        return [Item(kind=kind, name="transformers", target="tiny") for kind in ("model_format", "export_format")]

    @hookimpl
    def load_processor(self) -> Processor:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({"<end>": 0, "word": 1}, unk_token="word"))
        return Processor(tokenizer=PreTrainedTokenizerFast(tokenizer_object=words), pad_id=0, fingerprint="tiny")

    @hookimpl
    def build_dataset(self, split: Split) -> Examples | None:
        return Rows(self.seeds[split], split) if len(self.seeds[split]) else None

    @hookimpl
    def load_model(self, request: ModelRequest) -> Model:
        from dataclasses import replace

        model = tiny_model(seed=7 if request.name == "another" else 0, **self.changes)
        model = replace(model, name=request.name, role=request.role, compute=self._counted(model.compute))
        if request.options.dtype is not None:
            model.module.to(getattr(torch, request.options.dtype))
        self.loaded.append(model)
        return model

    @hookimpl
    def export_model(self, request: Any) -> Path:
        return request.folder

    def _counted(self, compute: Any) -> Any:
        def counted(module: nn.Module, batch: Batch, needs: frozenset[Need]) -> Outputs:
            self.forwards += 1
            if self.forwards == self.fails_at:
                raise KeyboardInterrupt
            return compute(module, batch, needs)

        return counted


class Watcher:
    """A loss that pushes chosen answers up and rejected ones down, and writes down both models' log-probabilities."""

    needs: frozenset[Need] = frozenset({"logps"})
    scope: Literal["token", "batch"] = "token"

    def __init__(self, extras: frozenset[str] = frozenset({"reference_logps"})) -> None:
        self.extras = extras
        self.steps: list[dict[int, tuple[Tensor, Tensor]]] = []
        self.held_out: dict[int, tuple[Tensor, Tensor]] = {}

    @hookimpl
    def build_loss(self) -> Loss:
        return self

    def counts(self, batch: Batch) -> Mapping[str, float]:
        return {"watched": float(batch.trained_tokens)}

    def __call__(self, batch: Batch, outputs: Outputs) -> LossOutput:
        assert outputs.logps_N is not None
        signs_N = (1 - 2 * (batch.document_N % 2)).float()
        if self.extras:
            reference = batch.extra["reference_logps"]
            assert reference.layout == "trained"
            assert reference.value.dtype == torch.float32
            assert not reference.value.requires_grad
            seen = {
                row: (outputs.logps_N.detach()[own], reference.value[own])
                for at, row in enumerate(batch.rows)
                if (own := batch.document_N // 2 == at).any()
            }
            if torch.is_grad_enabled():
                self.steps.append(seen)
            else:
                self.held_out |= seen
        total = -(signs_N * outputs.logps_N).sum()
        return LossOutput(terms=(Term(name="watched", total=total, count=float(batch.trained_tokens)),))


def config(folder: Path, *plugins: str, steps: int = 4, **sections: Any) -> dict[str, Any]:
    """A run of some steps over the pairs."""
    own = {"lora": {"r": 4, "dropout": 0.1}} if "lora" in plugins else {}
    trainer = {"max_steps": steps, "micro_batch": 2, "log_every": 1, "device": "cpu", "progress": "none"}
    return {
        "model": {"name": "tiny"},
        "output": str(folder / "run"),
        "plugins": ["tiny", *plugins, "adamw", "trainer"],
        "adamw": {"learning_rate": 1e-2, "schedule": "constant"},
        **own,
        **sections,
        "trainer": {**trainer, "save_every": None, **sections.get("trainer", {})},
    }


def run(folder: Path, tiny: Tiny, *plugins: str, watcher: Watcher | None = None, **sections: Any) -> Context:
    """Compose and run it."""
    instances: dict[str, object] = {"tiny": tiny} | ({"watcher": watcher} if watcher is not None else {})
    ctx = compose(config(folder, *plugins, **sections), instances=instances)
    execute(ctx)
    return ctx


def expected(seeds: Sequence[int], **changes: Any) -> dict[int, Tensor]:
    """The log-probabilities of the trained tokens of each row under the model as it starts, one answer at a time."""
    module = tiny_model(**{"initializer_range": 0.1, **changes}).module.eval()
    found = {}
    for number, seed in enumerate(seeds):
        example, parts, start = pair(seed), [], 0
        for length in example.documents:
            ids = torch.tensor([example.input_ids[start : start + length]])
            labels = torch.tensor(example.labels[start : start + length][1:])
            with torch.no_grad():
                logps = module(ids).logits[0, :-1].log_softmax(-1)
            trained = labels != UNTRAINED
            parts.append(logps[trained].gather(-1, labels[trained][:, None])[:, 0])
            start += length
        found[number] = torch.cat(parts)
    return found
