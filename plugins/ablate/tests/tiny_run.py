"""A plugin for tests: a network of plain torch, a few rows of bytes, gradient descent: a process trains in seconds.

Model, rows and optimizer are its own because importing torch.optim takes longer than a run. Shape suffixes:
B rows of a micro-batch, T tokens of a row, H hidden size, N trained tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pegbox.hooks import hookimpl
from pegbox.rows import Batch, Example
from pegbox.types import ExportRequest, Item, Model, Optimization, Outputs, ParameterGroup, Processor

VOCABULARY, WIDTH, RATE = 256, 16, 0.5
TEXTS = tuple(f"row {number} counts to {number * number}" for number in range(16))


class Rows:
    """Texts, one token for each byte, every token trained."""

    def __init__(self, texts: Sequence[str], split: Any) -> None:
        self._texts, self.split, self.fingerprint = texts, split, f"{len(texts)} texts"

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Example:
        ids = [*self._texts[index].encode()]
        return Example(input_ids=ids, labels=ids)

    def describe(self, index: int) -> str:
        return f"text {index}"


def compute(module: Any, batch: Batch, needs: object) -> Outputs:
    """Each token sees the sum of those before it; the log-probabilities of what follows."""
    hidden_BTH = module["mix"](module["embed"](batch.input_ids_BT).cumsum(1)).tanh()
    logps_NV = module["head"](hidden_BTH).flatten(0, 1)[batch.trained_N].log_softmax(-1)
    targets_N = batch.targets_BT.flatten()[batch.trained_N]
    return Outputs(logps_N=logps_NV.gather(-1, targets_N[:, None])[:, 0])


class Descent:
    """Gradient descent."""

    def __init__(self, parameters: Mapping[str, Any], groups: Sequence[ParameterGroup]) -> None:
        rates = [(group.names, RATE * (group.options.learning_rate_scale or 1)) for group in groups]
        self.param_groups = [{"params": [parameters[name] for name in names], "lr": rate} for names, rate in rates]

    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= group["lr"] * parameter.grad

    def zero_grad(self, set_to_none: bool) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {}


class Constant:
    """A learning rate that stays."""

    def get_last_lr(self) -> list[float]:
        return [RATE]

    def step(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}


class Plugin:
    """Owns what a run needs beyond sft and trainer."""

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        return [Item(kind=kind, name="transformers", target="tiny") for kind in ("model_format", "export_format")]

    @hookimpl
    def load_processor(self) -> Processor:
        return Processor(tokenizer=None, pad_id=0, fingerprint="bytes")  # type: ignore[arg-type]

    @hookimpl
    def build_dataset(self, split: str) -> Rows:
        return Rows(TEXTS if split == "train" else TEXTS[:2], split)

    @hookimpl
    def load_model(self) -> Model:
        import torch
        from torch import nn

        torch.manual_seed(0)
        parts = {"embed": nn.Embedding(VOCABULARY, WIDTH), "mix": nn.Linear(WIDTH, WIDTH)}
        module = nn.ModuleDict({**parts, "head": nn.Linear(WIDTH, VOCABULARY)})
        traits = frozenset({"causal"})
        return Model(module=module, name="tiny", base="tiny", format="transformers", compute=compute, traits=traits)

    @hookimpl
    def build_optimizer(self, model: Model, groups: Sequence[ParameterGroup]) -> Optimization:
        descent = Descent(dict(model.module.named_parameters()), groups)
        return Optimization(optimizer=descent, schedule=Constant())  # type: ignore[arg-type]

    @hookimpl
    def export_model(self, request: ExportRequest) -> Path:
        (request.folder / "exported").write_text("exported")
        return request.folder
