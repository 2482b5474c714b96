"""The plugin keeps the contract of plugins, losses and wrappers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pegbox.record import Json
from pegbox.rows import UNTRAINED, Batch, Example, Extra
from pegbox.testing import LossConformance, PluginConformance, TinyExamples, WrapperConformance, plain_model
from pegbox.testing.tiny import tiny_batches
from pegbox.types import Model, Need, Outputs


class TwoLabels:
    """The outputs of a network with two numbers for each token in place of one."""

    def __init__(self, model: Model) -> None:
        self._compute = model.compute

    def __call__(self, module: torch.nn.Module, batch: Batch, needs: frozenset[Need]) -> Outputs:
        hidden_BTH = self._compute(module, batch, frozenset({"hidden"})).hidden_BTH
        return Outputs(values_BTC=hidden_BTH[..., :2])


class Marked(TinyExamples):
    """Rows whose last two tokens are marked, with their verdicts."""

    def __getitem__(self, index: int) -> Example:
        row = super().__getitem__(index)
        labels = [*[UNTRAINED] * (len(row.input_ids) - 2), *row.input_ids[-2:]]
        columns: dict[str, Json] = {"labels": [True, False]}
        return replace(row, labels=labels, columns=columns)


class Source:
    """A source of batches that has none."""

    def __init__(self) -> None:
        self.examples = Marked(["one", "two"])
        self.total_steps: int | None = 0

    def __iter__(self) -> Any:
        return iter(())

    def describe(self, batch: Batch) -> str:
        return "nothing"

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Nothing is kept."""


class TestPrm(PluginConformance, LossConformance, WrapperConformance):
    plugin = "prm"

    def loss_model(self) -> Model:
        model = plain_model()
        return replace(model, compute=TwoLabels(model))

    def batches(self) -> list[Batch]:
        source = torch.Generator().manual_seed(3)
        made = []
        for batch in tiny_batches():
            verdicts = torch.randint(0, 2, batch.trained_N.shape, generator=source)
            made.append(replace(batch, extra={"verdicts": Extra(value=verdicts, layout="trained")}))
        return made

    def result(self, hook: str) -> Any:
        return Marked(["one", "two and three"]) if hook == "build_dataset" else Source()

    def arguments(self, ctx: Any) -> dict[str, Any]:
        return {"ctx": ctx}
