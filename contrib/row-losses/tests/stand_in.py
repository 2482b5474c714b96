"""A plugin for tests that owns what a run needs beyond row-losses and the trainer, and nothing of it random.

Rows are texts of the kit's byte tokenizer; the first bytes of each are not trained. The model is the kit's
Llama, the loss the sum of -logps, the optimizer plain SGD.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pegbox.hooks import hookimpl
from pegbox.rows import UNTRAINED, Example
from pegbox.testing import TinyExamples, tiny_model, tiny_processor
from pegbox.types import Item, LossOutput, Optimization, Term

WORDS = ("alpha", "be", "gamma ray", "d", "epsilon and more of it", "zeta", "eta, eta", "theta rho")
TEXTS = tuple(f"{number}: {word}" for number, word in enumerate(WORDS))
PROMPT = 3


class Texts(TinyExamples):
    """The prompt `0: ` of each row is not trained; the fourth row is not trained at all."""

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        trained = 10_000 if self.split == "train" and index == 3 else PROMPT
        labels = [UNTRAINED if at < trained else token for at, token in enumerate(example.input_ids)]
        return Example(input_ids=example.input_ids, labels=labels)

    def describe(self, index: int) -> str:
        return f"{self.split}.jsonl:{index + 1}"


class NegativeLogLikelihood:
    """The least that is a loss (`pegbox.types.Loss`)."""

    needs = frozenset({"logps"})
    scope = "token"

    def counts(self, batch):
        return {"nll": float(batch.trained_tokens)}

    def __call__(self, batch, outputs):
        return LossOutput(terms=(Term(name="nll", total=-outputs.logps_N.sum(), count=batch.trained_tokens),))


class Plugin:
    """`learning_rate` is an attribute, so that a test can freeze the model."""

    learning_rate = 0.05

    @hookimpl
    def register_items(self):
        return [Item(kind=kind, name="transformers", target="tiny") for kind in ("model_format", "export_format")]

    @hookimpl
    def load_processor(self):
        return tiny_processor()

    @hookimpl
    def build_dataset(self, split):
        return Texts(TEXTS if split == "train" else ["held out", "so is this"], split)

    @hookimpl
    def load_model(self, request):
        return tiny_model()

    @hookimpl
    def build_loss(self):
        return NegativeLogLikelihood()

    @hookimpl
    def build_optimizer(self, model):
        optimizer = torch.optim.SGD(model.module.parameters(), lr=self.learning_rate)
        return Optimization(optimizer=optimizer, schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0))

    @hookimpl
    def export_model(self, model, request) -> Path:
        return request.folder


class Frozen(Plugin):
    """Every visit of a row sees the same model."""

    learning_rate = 0.0
