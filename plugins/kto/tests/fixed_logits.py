"""A causal model without weights: its logits are random numbers that a document's ids alone decide.

    B  rows    T  tokens of a row    V  vocabulary

However documents are laid out, by us or by TRL, their logits are the same, and each has a gradient of its own.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from zlib import crc32

import torch
from pegbox.testing.tiny import PAD, VOCABULARY, tiny_model
from torch import Tensor


class FixedLogits(torch.nn.Module):
    """Gives logits, or hands them as hidden states to a head that leaves them as they are, for TRL's fused head."""

    def __init__(self, seed: int, spread: float) -> None:
        super().__init__()
        self.config = tiny_model().module.config
        self.seed, self.spread = seed, spread
        self.head = torch.nn.Linear(VOCABULARY, VOCABULARY, bias=False).requires_grad_(False)
        torch.nn.init.eye_(self.head.weight)
        self.leaf_BTV: Tensor | None = None

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self._logits(input_ids), hidden_states=None)

    def base_model(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self._logits(input_ids))

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head

    def _logits(self, ids_BT: Tensor) -> Tensor:
        logits_BTV = torch.zeros(*ids_BT.shape, VOCABULARY)
        for row, ids in enumerate(ids_BT.tolist()):
            document = [token for token in ids if token != PAD]
            source = torch.Generator().manual_seed(crc32(repr((self.seed, document)).encode()))
            end = len(document)
            logits_BTV[row, :end] = self.spread * torch.randn(end, VOCABULARY, generator=source)
            # The next token is raised by a number that all models share: documents have all kinds of odds.
            raised_T = 3 * torch.rand(end - 1, generator=torch.Generator().manual_seed(len(document)))
            logits_BTV[row].view(-1)[torch.arange(end - 1) * VOCABULARY + torch.tensor(document[1:])] += raised_T
        if torch.is_grad_enabled():
            self.leaf_BTV = logits_BTV.requires_grad_()
        return logits_BTV
