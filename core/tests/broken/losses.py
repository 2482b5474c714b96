"""Losses that break one promise each. The sound one is the cross-entropy of the trained tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pegbox.rows import Batch
from pegbox.types import LossOutput, Model, Outputs, Term


class SoundLoss:
    """Minus the sum of the log-probabilities, over the number of trained tokens."""

    needs: Any = frozenset({"logps"})
    scope: Any = "token"

    def __init__(self, model: Model) -> None:
        self.model = model

    def counts(self, batch: Batch) -> Mapping[str, Any]:
        return {"sample": float(batch.trained_tokens)}

    def total(self, batch: Batch, outputs: Outputs) -> Any:
        assert outputs.logps_N is not None, "it was asked for"
        return -outputs.logps_N.sum()

    def __call__(self, batch: Batch, outputs: Outputs) -> LossOutput:
        term = Term(name="sample", total=self.total(batch, outputs), count=self.counts(batch)["sample"])
        return LossOutput(terms=(term,))


class NeedsAsList(SoundLoss):
    needs = ("logps",)


class UnknownScope(SoundLoss):
    scope = "sequence"


class DividesByNothing(SoundLoss):
    """The mean over the micro-batch, multiplied back: 0 / 0 where nothing is trained."""

    def total(self, batch: Batch, outputs: Outputs) -> Any:
        count = batch.trained_N.new_tensor(float(batch.trained_tokens), dtype=outputs.logps_N.dtype)
        return super().total(batch, outputs) / count * count


class ChangedClass(SoundLoss):
    """Replaces a method of the class that the model's head has."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        cls = type(model.module["head"])
        original = cls.forward
        cls.forward = lambda module, hidden: original(module, hidden)


class WithoutGradient(SoundLoss):
    def total(self, batch: Batch, outputs: Outputs) -> Any:
        return super().total(batch, outputs).detach()


class GradientOfNothing(SoundLoss):
    """The clip cuts everything off."""

    def total(self, batch: Batch, outputs: Outputs) -> Any:
        return super().total(batch, outputs).clamp(max=0.0)


class CountOfTheOutputs(SoundLoss):
    """Counts the tokens that the model finds likely."""

    def __call__(self, batch: Batch, outputs: Outputs) -> LossOutput:
        assert outputs.logps_N is not None, "it was asked for"
        count = float((outputs.logps_N > -5.5).sum())
        return LossOutput(terms=(Term(name="sample", total=self.total(batch, outputs), count=count),))


class CountOnTheDevice(SoundLoss):
    def counts(self, batch: Batch) -> Mapping[str, Any]:
        return {"sample": (batch.targets_BT != -100).sum()}


class MeanOfThePaddedRows(SoundLoss):
    """Divides by the width of the batch."""

    def total(self, batch: Batch, outputs: Outputs) -> Any:
        return super().total(batch, outputs) / batch.input_ids_BT.shape[1]


class MeanOfTheMicroBatch(SoundLoss):
    """Divides by the tokens of the micro-batch, as a mean does."""

    def total(self, batch: Batch, outputs: Outputs) -> Any:
        return super().total(batch, outputs) / max(batch.trained_tokens, 1)


class SecondForward(SoundLoss):
    """Regularizes with a second forward of the model."""

    def total(self, batch: Batch, outputs: Outputs) -> Any:
        again = self.model.compute(self.model.module, batch, frozenset({"logps"})).logps_N
        return super().total(batch, outputs) - 0.1 * again.sum()
