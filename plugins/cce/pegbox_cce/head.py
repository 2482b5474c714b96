"""The head by a fused kernel.

The seam is the child `token_head` of a model: its forward takes `(hidden_NH, projection, targets_N, needs)`, its `rule`
does to logits what the model does (scale, then soft cap).

    N  trained tokens    H  hidden size    V  vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from pegbox.errors import ConfigError
from pegbox.types import ModulePatch, Need, Outputs

from pegbox_cce.projection import Compute, call

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from pegbox_cce.config import CceConfig
    from pegbox_cce.expected import Expected

HEAD = "token_head"
SOURCES = {
    "pegbox": "pegbox_kernels.linear_logprob",
    "apple": "cut-cross-entropy, arXiv:2411.09009",
    "liger": "liger-kernel, arXiv:2410.10989",
}


def patches(settings: CceConfig, expected: Expected) -> list[ModulePatch]:
    """The record for the head."""
    return [
        ModulePatch(
            slot="head",
            target=HEAD,
            replace=lambda head: _fused(head, settings, expected),
            reason=f"log-probabilities by the kernel of {settings.implementation}, never all logits in memory",
            source=SOURCES[settings.implementation],
        )
    ]


def _fused(head: Any, settings: CceConfig, expected: Expected) -> Callable[..., Outputs]:
    whole, rule = head.forward, head.rule
    if settings.implementation != "pegbox" and rule.scale != 1.0:
        raise ConfigError(
            f"cce.implementation is {settings.implementation}, and the model multiplies its logits by {rule.scale}",
            "That library knows a soft cap, and no scale.",
            "Set cce.implementation to pegbox.",
        )

    def forward(hidden_NH: Tensor, projection: Module, targets_N: Tensor, needs: frozenset[Need]) -> Outputs:
        if "logits" in needs or (settings.implementation != "pegbox" and ("entropy" in needs or not len(targets_N))):
            return whole(hidden_NH, projection, targets_N, needs)  # type: ignore[no-any-return]
        compute: Compute
        if settings.implementation == "pegbox":
            compute = partial(_pegbox, targets_N, rule, settings, expected, "entropy" in needs)
        else:
            compute = partial({"apple": _apple, "liger": _liger}[settings.implementation], targets_N, rule)
        logps_N, entropy_N = call(projection, hidden_NH, compute)
        return Outputs(logps_N=logps_N if "logps" in needs else None, entropy_N=entropy_N)

    return forward


def _pegbox(
    targets_N: Tensor,
    rule: Any,
    settings: CceConfig,
    expected: Expected,
    entropy: bool,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    from pegbox_kernels.linear_logprob import linear_token_logprobs

    found = linear_token_logprobs(
        hidden_NH,
        weight_VH,
        targets_N,
        bias_V=bias_V,
        scale=rule.scale,
        softcap=rule.softcap,
        entropy=entropy,
        entropy_gradient=entropy and expected.entropy_gradient,
        uniform=expected.uniform,
        logits_bytes=None if settings.logits_gib is None else int(settings.logits_gib * 2**30),
    )
    return found.logps, found.entropy


def _apple(
    targets_N: Tensor, rule: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None
) -> tuple[Tensor, None]:
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found,import-untyped,unused-ignore]

    dtype = hidden_NH.dtype
    if torch.is_autocast_enabled(hidden_NH.device.type):
        dtype = torch.get_autocast_dtype(hidden_NH.device.type)
    operands = (hidden_NH.to(dtype), weight_VH.to(dtype))
    return -linear_cross_entropy(*operands, targets_N, softcap=rule.softcap, reduction="none"), None


def _liger(
    targets_N: Tensor, rule: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None
) -> tuple[Tensor, None]:
    """With `reduction="none"` the library computes logits again in its backward, for the coefficients of tokens."""
    from liger_kernel.ops import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
        fused_linear_cross_entropy as liger,
    )

    options = (None, -100, 0.0, 0.0, "none", rule.softcap, False, torch.float32)
    loss_N = liger.LigerFusedLinearCrossEntropyFunction.apply(hidden_NH, weight_VH, targets_N, bias_V, *options)[0]
    return -loss_N, None
