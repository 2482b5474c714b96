"""A linear head and what a loss wants of it, without its logits in memory.

    logps, entropy, logsumexp = linear_token_logprobs(hidden, weight, targets)       # any loss of log-probabilities
    found = linear_cross_entropy(hidden, weight, targets, label_smoothing=0.1)        # found.loss_sum / found.count

Logits are made, reduced and differentiated chunk by chunk (`chunks.py`), gradients in the forward where that is right
(`ops.py`). CUDA tensors (and CPU tensors under Triton's interpreter) take the kernels of `triton.py`, all others the
plain PyTorch of `plain.py`, chunked alike.

N  rows (tokens)    H  hidden size    V  vocabulary
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pegbox_kernels.dispatch import is_for_gpu
from pegbox_kernels.linear_logprob import ops

__all__ = ["LinearCrossEntropy", "LinearLogprobs", "linear_cross_entropy", "linear_token_logprobs"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FROZEN_BYTES = 880 << 20
"""Scratch for logits when the weight is frozen: with the gradient of 16384 x 2880 below 1 GiB."""
TRAINED_BYTES = 1640 << 20
"""When it is trained: below 4 GiB with an fp32 gradient of 201088 x 2880, which few chunks seldom read and write."""

HOST_BYTES = 64 << 20
"""On a CPU, where plain PyTorch keeps some fp32 copies of a chunk."""


class LinearLogprobs(NamedTuple):
    """What `linear_token_logprobs` returns, each (N) in fp32; `entropy` is None unless asked for."""

    logps: Tensor
    entropy: Tensor | None
    logsumexp: Tensor


class LinearCrossEntropy(NamedTuple):
    """What `linear_cross_entropy` returns, each a sum over rows, fp32, zero dimensions.

    Attributes:
        loss_sum: token weight times (label-smoothed negative log-likelihood + z-loss); differentiable.
        count: token weights of rows that are not ignored.
        z_loss_sum: the z-loss in `loss_sum`.
        correct: token weights of rows in which no logit is above the target's.
    """

    loss_sum: Tensor
    count: Tensor
    z_loss_sum: Tensor
    correct: Tensor


def linear_token_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    entropy_gradient: bool = False,
    uniform: bool = False,
    logits_bytes: int | None = None,
) -> LinearLogprobs:
    """Log-probabilities of targets under softmax of softcap * tanh(scale * (W h + b) / softcap) / temperature.

    With `weight` and `bias` frozen the forward makes the gradient of each logp (4 N H V operations in all, whatever
    the loss). With them trained, logits are computed again in the backward (8 N H V), unless `uniform`. The gradient of
    an entropy or a logsumexp is always computed again. All are right for every gradient that arrives; `uniform` and
    `entropy_gradient` say what to expect, and cost time only if they are wrong.

    Args:
        hidden_NH: fp32, bf16 or fp16. Under autocast the products are in its dtype; else the weight must have theirs.
        weight_VH: rows of the head.
        targets_N: integer ids below V. A row of `ignore_index` gives zeros and no gradient, but is computed: leave such
            rows out where you can. On a GPU an id outside the vocabulary gives NaN; on a CPU it is an error.
        bias_V: added to the logits in fp32.
        scale: multiplies the logits before the cap; above zero.
        softcap: Gemma's; None for none.
        temperature: divides the logits after the cap; above zero.
        ignore_index: the id of rows that are not trained.
        entropy: also the entropy of each row, in nats.
        entropy_gradient: entropy or logsumexp will be differentiated: make no gradient in the forward.
        uniform: every logp will get the same gradient, as from `-logps.sum()`: make the gradient of the weight in the
            forward (6 N H V). Checked in the backward without asking the device.
        logits_bytes: scratch memory for logits; None: 880 MiB, 1640 MiB if the weight is trained (64 MiB on a CPU).

    Returns:
        `logps`, `entropy` and `logsumexp`, (N), fp32, each differentiable once.

    Raises:
        ValueError: shapes, dtypes or numbers do not fit.
    """
    dtype = _check(hidden_NH, weight_VH, targets_N, bias_V)
    rule = _rule(scale, softcap, temperature, ignore_index)
    need = _needed(hidden_NH, weight_VH, bias_V)
    trained = need[1] or need[2]
    ahead = not entropy_gradient and (uniform or not trained)
    arguments = (*rule, dtype, _budget(hidden_NH, trained, logits_bytes), entropy)
    keep = (needed and ahead for needed in need)
    found = ops.linear_logps(hidden_NH, weight_VH, bias_V, targets_N, *arguments, *keep)
    return LinearLogprobs(found[0], found[1] if entropy else None, found[2])


def linear_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    token_weights_N: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    logits_bytes: int | None = None,
) -> LinearCrossEntropy:
    """The sum over rows of w_n (-(1 - e) logp_target - e mean_v logp_v + z lse^2), and its count: no mean is taken.

    Gradients are made in the forward, for 4 N H V operations with a frozen weight and 6 N H V with a trained one.

    Args:
        token_weights_N: w_n, not differentiable; None: 1.
        label_smoothing: e, in [0, 1).
        z_loss: z, the factor of the squared logsumexp (PaLM: 1e-4).

    The others are those of `linear_token_logprobs`.

    Raises:
        ValueError: shapes, dtypes or numbers do not fit; token weights that need a gradient.
    """
    dtype = _check(hidden_NH, weight_VH, targets_N, bias_V)
    rule = _rule(scale, softcap, temperature, ignore_index)
    _check_objective(targets_N, token_weights_N, label_smoothing, z_loss)
    need = _needed(hidden_NH, weight_VH, bias_V)
    budget = _budget(hidden_NH, need[1] or need[2], logits_bytes)
    objective = (token_weights_N, label_smoothing, z_loss)
    found = ops.linear_nll(hidden_NH, weight_VH, bias_V, targets_N, *rule, dtype, budget, *objective, *need)
    return LinearCrossEntropy(*found[:4])


def _needed(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool, bool]:
    """Which of the three get a gradient."""
    on = torch.is_grad_enabled()
    return on and hidden.requires_grad, on and weight.requires_grad, on and bias is not None and bias.requires_grad


def _budget(hidden: Tensor, trained: bool, logits_bytes: int | None) -> int:
    """Bytes for logits."""
    if logits_bytes is not None and logits_bytes <= 0:
        raise ValueError(f"logits_bytes is {logits_bytes}: it is memory for logits and must be above 0; None: default.")
    default = TRAINED_BYTES if trained else FROZEN_BYTES
    on_host = hidden.device.type == "cpu" and not is_for_gpu(hidden)
    return logits_bytes or (HOST_BYTES if on_host else default)


def _rule(
    scale: float, softcap: float | None, temperature: float, ignore_index: int
) -> tuple[float, float, float, int]:
    if not scale > 0:
        raise ValueError(f"scale is {scale}: it multiplies the logits and must be above 0.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}: it bounds the logits and must be above 0; None: no cap.")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it divides the logits and must be above 0; take argmax for 0.")
    return float(scale), float(softcap or 0.0), float(temperature), ignore_index


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype of the products; raises if the inputs do not fit."""
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)}"
    if hidden.ndim != 2 or weight.ndim != 2 or targets.ndim != 1:
        raise ValueError(f"{shapes}: they must be (N, H), (V, H) and (N). Flatten the leading dimensions.")
    if hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"{shapes} do not fit: one target for each row of hidden. Shift before flattening.")
    if hidden.shape[1] != weight.shape[1] or not weight.shape[0]:
        raise ValueError(f"{shapes} do not fit: the weight must be (V, H), as that of nn.Linear, with V above 0.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}: it must be (V).")
    if targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"targets are {targets.dtype}: ids must be int64 or int32. Use targets.long().")
    places = {str(tensor.device) for tensor in (hidden, weight, targets, bias) if tensor is not None}
    if len(places) > 1:
        raise ValueError(f"the inputs lie on {' and '.join(sorted(places))}. Move them to one device.")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}: it must be bf16, fp16 or fp32. For fp64 use the reference.")
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}: outside of autocast they must have one dtype. "
            "Convert one of them, or call within torch.autocast."
        )
    return hidden.dtype


def _check_objective(targets: Tensor, token_weights: Tensor | None, label_smoothing: float, z_loss: float) -> None:
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}: it must be at least 0 and below 1.")
    if not z_loss >= 0:
        raise ValueError(f"z_loss is {z_loss}: it is the factor of the squared logsumexp and must be at least 0.")
    if token_weights is None:
        return
    if token_weights.shape != targets.shape or not token_weights.is_floating_point():
        seen = f"token_weights {tuple(token_weights.shape)} in {token_weights.dtype}"
        raise ValueError(
            f"{seen}, for targets {tuple(targets.shape)}: there must be one floating-point weight per row."
        )
    if token_weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "token_weights need a gradient, which is not computed. Detach them, or use linear_token_logprobs."
        )
