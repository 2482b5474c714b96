"""The noise: uniform within alpha / sqrt(L d), for a document of L tokens and embeddings d wide (algorithm 1).

It must not depend on how a step is split. So it is no sequence that a generator draws, but a function of the run's
seed, the step, the document's tokens, the position in it and the dimension: the same for a document alone, in any
micro-batch, on any process, padded or packed, and after a resume. A 32-bit integer hash makes it, in plain operations
on the device.

    B  rows    T  tokens    H  width of an embedding    D  documents of a micro-batch
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from pegbox.errors import ConfigError
from pegbox.types import ModulePatch

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import Batch
    from pegbox.types import Model, Need, Outputs
    from torch import Tensor
    from torch.nn import Module

MASK = 0xFFFFFFFF


class EmbeddingNoise:
    """Adds noise to what the input embeddings return, in training only.

    Attributes:
        step: optimizer steps made so far.
    """

    def __init__(self, ctx: Context, alpha: float) -> None:
        self._ctx, self._alpha = ctx, alpha
        self._batch: Batch | None = None
        self.step = 0

    def patches(self, model: Model) -> list[ModulePatch]:
        """The record for the input embeddings.

        Raises:
            ConfigError: the model does not say which module they are.
        """
        ask = getattr(model.module, "get_input_embeddings", None)
        embeddings = ask() if ask is not None else None
        if embeddings is None:
            raise ConfigError(
                f"neftune finds no input embeddings in {model.name}",
                "The module has no get_input_embeddings().",
                "Remove neftune from plugins.",
            )
        return [
            ModulePatch(
                slot="embedding",
                target=lambda _, module: module is embeddings,
                replace=self._noisy,
                reason=f"noise of strength {self._alpha:g} on embeddings in training",
                source="arXiv:2310.05914",
            )
        ]

    def following(self, model: Model) -> Model:
        """The model whose forward says which batch it computes."""
        forward = model.forward
        assert forward is not None, "the owner of place_model gives a forward"

        def followed(batch: Batch, needs: frozenset[Need]) -> Outputs:
            self._batch = batch
            try:
                return forward(batch, needs)
            finally:
                self._batch = None

        return replace(model, forward=followed)

    def _noisy(self, module: Module) -> Callable[..., Any]:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            embedded_BTH = original(*args, **kwargs)
            if self._batch is None or not (module.training and torch.is_grad_enabled()):
                return embedded_BTH
            return embedded_BTH + self.of(self._batch, embedded_BTH.shape[-1]).to(embedded_BTH.dtype)

        return forward

    def of(self, batch: Batch, width: int) -> Tensor:
        """Noise of shape B x T x H for one micro-batch of the step that comes next."""
        document_BT, position_BT, length_BT = documents(batch)
        key_BT = hashed(batch.input_ids_BT ^ hashed(position_BT))
        if batch.attention_mask_BT is not None:
            key_BT = key_BT * batch.attention_mask_BT
        # A document's key is the sum of its tokens' keys; there are at most as many documents as tokens.
        key_D = torch.zeros(key_BT.numel(), dtype=torch.int64, device=key_BT.device)
        key_D.scatter_add_(0, document_BT.flatten(), key_BT.flatten())
        seed_BT = hashed(key_D ^ (self._ctx.rng("neftune", self.step + 1).seed & MASK))[document_BT]
        counter_BTH = position_BT.unsqueeze(-1) * width + torch.arange(width, device=key_BT.device)
        unit_BTH = hashed(counter_BTH ^ seed_BT.unsqueeze(-1)).to(torch.float32) / 2**31 - 1.0
        return unit_BTH * (self._alpha / (length_BT.clamp(min=1).unsqueeze(-1) * width).sqrt())


def documents(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """For each token: the number of its document in the batch, its position in it, and the document's length."""
    ids_BT = batch.input_ids_BT
    rows, tokens = ids_BT.shape
    if batch.cu_seqlens_S is None:
        position_BT = torch.arange(tokens, device=ids_BT.device).expand(rows, -1)
        document_BT = torch.arange(rows, device=ids_BT.device).unsqueeze(-1).expand(-1, tokens)
        mask_BT = batch.attention_mask_BT
        length_B1 = torch.full((rows, 1), tokens, device=ids_BT.device) if mask_BT is None else mask_BT.sum(-1, True)
        return document_BT, position_BT, length_B1.expand(-1, tokens)
    borders_S = batch.cu_seqlens_S.long()
    flat = torch.arange(rows * tokens, device=ids_BT.device)
    document = (torch.searchsorted(borders_S, flat, right=True) - 1).clamp(min=0, max=len(borders_S) - 2)
    length = (borders_S[1:] - borders_S[:-1])[document]
    position = flat - borders_S[document]
    return tuple(part.view(rows, tokens) for part in (document, position, length))


def hashed(value: Tensor) -> Tensor:
    """A 32-bit mixing function on int64 tensors (the constants of `lowbias32`, public domain)."""
    value = value & MASK
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & MASK
    value = ((value ^ (value >> 15)) * 0x846CA68B) & MASK
    return value ^ (value >> 16)
