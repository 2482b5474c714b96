"""The head, chunk by chunk: projection, log-sum-exp and the target's logit for some tokens at a time.

Each chunk keeps its hidden states only and is computed again in the backward, so no more logits than those of one chunk
are in memory at any time, forward or backward, for one more projection. The gradient of the projection is summed over
chunks by autograd, and so is that of an adapter on it.

The seam is the child `token_head` of a model: its forward takes `(hidden_NH, projection, targets_N, needs)`, its `rule`
does to logits what the model does.

    N  trained tokens    C  tokens of a chunk    H  hidden size    V  vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from pegbox.errors import ConfigError
from pegbox.types import ModulePatch, Need, Outputs
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from pegbox.types import Loss
    from torch import Tensor
    from torch.nn import Module

    from pegbox_chunked_cross_entropy.config import ChunkedCrossEntropyConfig

HEAD = "token_head"


def patches(config: ChunkedCrossEntropyConfig) -> list[ModulePatch]:
    """The record for the head."""
    return [
        ModulePatch(
            slot="head",
            target=HEAD,
            replace=lambda head: _chunked(head, config.chunk),
            reason=f"log-probabilities of {config.chunk} tokens at a time, never all logits in memory",
        )
    ]


def require_chunks(loss: Loss) -> None:
    """Raise if the loss wants all logits at once.

    Raises:
        ConfigError: it does.
    """
    if "logits" in loss.needs:
        raise ConfigError(
            f"chunked-cross-entropy is in plugins, but the loss {type(loss).__name__} needs all logits",
            "They would be in memory whatever the chunk: the plugin would do nothing.",
            "Remove chunked-cross-entropy from plugins.",
        )


def _chunked(head: Any, size: int) -> Callable[..., Outputs]:
    whole, rule = head.forward, head.rule

    def chunk(hidden_CH: Tensor, targets_C: Tensor, projection: Module, entropy: bool) -> tuple[Tensor, Tensor]:
        logits_CV = rule(projection(hidden_CH).float())
        normalizer_C = torch.logsumexp(logits_CV, dim=-1)
        logps_C = logits_CV.gather(-1, targets_C.unsqueeze(-1)).squeeze(-1) - normalizer_C
        if not entropy:
            return logps_C, logps_C.new_empty(0)
        logps_CV = logits_CV - normalizer_C.unsqueeze(-1)
        return logps_C, -(logps_CV.exp() * logps_CV).sum(-1)

    def forward(hidden_NH: Tensor, projection: Module, targets_N: Tensor, needs: frozenset[Need]) -> Outputs:
        if "logits" in needs:
            return whole(hidden_NH, projection, targets_N, needs)  # type: ignore[no-any-return]
        parts = [
            checkpoint(chunk, hidden_CH, targets_C, projection, "entropy" in needs, use_reentrant=False)
            for hidden_CH, targets_C in zip(hidden_NH.split(size), targets_N.split(size), strict=True)
        ]
        logps_N, entropy_N = (torch.cat(column) for column in zip(*parts, strict=True))
        return Outputs(
            logps_N=logps_N if "logps" in needs else None, entropy_N=entropy_N if "entropy" in needs else None
        )

    return forward
