"""Log-probability of tokens, entropy and logsumexp of their distributions, in one read of the logits.

    logps, entropy, logsumexp = token_logprobs(logits, targets, temperature=0.7, entropy=True)

All three are differentiable once: `logsumexp` squared is the z-loss of PaLM, `entropy` the bonus of policy
gradients. CUDA tensors (and CPU tensors under Triton's interpreter) take the kernels of `triton.py`, all
others the plain PyTorch of `reference.py`. Registered as `torch.ops.pegbox_kernels.token_logprobs`, so that
torch.compile keeps it whole.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from pegbox_kernels.dispatch import runs_kernels, values_at_hand
from pegbox_kernels.logprob import reference
from pegbox_kernels.operators import differentiable, operator

__all__ = ["TokenLogprobs", "token_logprobs"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TokenLogprobs(NamedTuple):
    """What `token_logprobs` returns, each (...) in fp32; `entropy` is None unless asked for."""

    logps: Tensor
    entropy: Tensor | None
    logsumexp: Tensor


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    inplace_backward: bool = False,
) -> TokenLogprobs:
    """Log-probabilities of `targets` under softmax(logits / temperature), accumulated in fp32.

    A row whose target is `ignore_index` is not read; its results and its gradient are zero. On a GPU a target
    outside the vocabulary gives NaN (asking the device would make it wait); on a CPU it is an error.

    Args:
        logits: (..., V), fp32, bf16 or fp16; -inf is allowed; strided rows (`logits[:, :-1]`) are not copied.
        targets: (...), integer ids below V.
        temperature: divides the logits; above zero.
        ignore_index: the id of rows that are not trained.
        entropy: also compute the entropy of each row, in nats.
        inplace_backward: write the gradient into the memory of `logits`, which saves a tensor of their size.
            Autograd raises if anything else needs the logits for its own backward.

    Returns:
        `logps`, `entropy` and `logsumexp` (of the scaled logits), (...), fp32.

    Raises:
        ValueError: shapes, dtypes or the temperature do not fit.
    """
    _check(logits, targets, temperature)
    if inplace_backward and torch.is_grad_enabled() and logits.requires_grad:
        _check_inplace(logits)
    logps, entropies, logsumexp, _ = _op(logits, targets, temperature, ignore_index, entropy, inplace_backward)
    return TokenLogprobs(logps, entropies if entropy else None, logsumexp)


def _check(logits: Tensor, targets: Tensor, temperature: float) -> None:
    shapes = f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)}"
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{shapes}: logits need a vocabulary as their last dimension.")
    if logits.shape[:-1] != targets.shape:
        shift = logits.ndim == 3 and logits.shape[1] == (targets.shape[1] + 1 if targets.ndim == 2 else None)
        hint = "Shift them first: logits[:, :-1]." if shift else "Pass one target per row of logits."
        raise ValueError(f"{shapes} do not fit: targets must have the shape of logits without the last. {hint}")
    if logits.dtype not in DTYPES:
        raise ValueError(
            f"logits are {logits.dtype}: the kernels compute bf16, fp16 and fp32. Use logits.float(), or "
            "pegbox_kernels.logprob.reference for fp64."
        )
    if targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"targets are {targets.dtype}: ids must be int64 or int32. Use targets.long().")
    if logits.device != targets.device:
        raise ValueError(f"logits lie on {logits.device} and targets on {targets.device}. Move one of them.")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it divides the logits and must be above 0; take argmax for 0.")


def _check_inplace(logits: Tensor) -> None:
    if logits.is_leaf:
        raise ValueError(
            "inplace_backward=True with logits that are a leaf: their values would become their own "
            "gradient. Pass inplace_backward=False."
        )
    if any(stride == 0 and length > 1 for length, stride in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError(
            f"inplace_backward=True with expanded logits (strides {logits.stride()}): rows share memory. "
            "Pass inplace_backward=False."
        )


if importlib.util.find_spec("triton") is not None:
    from pegbox_kernels.logprob import triton as kernels
else:
    kernels = None  # type: ignore[assignment]


def _forward(logits, targets, temperature, ignore_index, entropy, inplace_backward):  # type: ignore[no-untyped-def]
    """logps, entropy (no elements unless asked for), logsumexp, and its parts, which the backward needs."""
    if values_at_hand(logits):
        _check_ids(targets, logits.shape[-1], ignore_index)
    if runs_kernels(logits):
        return kernels.forward(logits, targets, temperature, ignore_index, entropy)
    logps, entropies, logsumexp = reference.token_logprobs(logits, targets, temperature, ignore_index, entropy)
    parts = reference.softmax_parts(logits, temperature)
    return logps, logps.new_empty(0) if entropies is None else entropies, logsumexp, parts


def _check_ids(targets: Tensor, vocab: int, ignore_index: int) -> None:
    wrong = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
    if wrong.any():
        raise ValueError(
            f"target {targets[wrong][0].item()} is outside the vocabulary of {vocab} and is not ignore_index "
            f"({ignore_index}). The tokenizer has more tokens than the head has rows, or targets are no ids."
        )


def _fake_forward(logits, targets, temperature, ignore_index, entropy, inplace_backward):  # type: ignore[no-untyped-def]
    def result(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logits.device)

    rows = targets.shape
    return result(*rows), result(*rows) if entropy else result(0), result(*rows), result(2, *rows)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits, targets, ctx.temperature, ctx.ignore_index, _, ctx.inplace = inputs
    _, entropy, _, parts = output
    ctx.mark_non_differentiable(parts)
    ctx.save_for_backward(logits, targets, parts, entropy)


def _differentiate(ctx, *grads):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors  # Only once: a checkpoint computes them again for each time that they are asked for.
    logits = saved[0]
    arguments = (*saved, *grads[:3], ctx.temperature, ctx.ignore_index)
    if not ctx.inplace:
        return _backward(*arguments), None, None, None, None, None
    _backward_inplace(*arguments)
    return logits, None, None, None, None, None


_op = differentiable(
    "token_logprobs",
    _forward,
    _fake_forward,
    schema="(Tensor logits, Tensor targets, float temperature, int ignore_index, bool entropy, "
    "bool inplace_backward) -> (Tensor, Tensor, Tensor, Tensor)",
    save=_save,
    differentiate=_differentiate,
)

_BACKWARD_ARGUMENTS = (
    "Tensor targets, Tensor parts, Tensor entropy, Tensor grad_logps, Tensor grad_entropy, "
    "Tensor grad_logsumexp, float temperature, int ignore_index"
)


def _gradient(  # type: ignore[no-untyped-def]
    logits, targets, parts, entropy, grad_logps, grad_entropy, grad_logsumexp, temperature, ignore_index
):
    grads = (grad_logps, grad_entropy, grad_logsumexp)
    if runs_kernels(logits):
        return kernels.backward(logits, targets, parts, entropy, grads, temperature, ignore_index)
    known = entropy if entropy.shape == targets.shape else None
    return reference.token_logprobs_backward(
        logits, targets, parts, known, grads, temperature, ignore_index
    ).contiguous()


def _fake_gradient(logits, *_):  # type: ignore[no-untyped-def]
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


_backward = operator(
    "token_logprobs_backward", _gradient, _fake_gradient, schema=f"(Tensor logits, {_BACKWARD_ARGUMENTS}) -> Tensor"
)


def _gradient_in_place(  # type: ignore[no-untyped-def]
    logits, targets, parts, entropy, grad_logps, grad_entropy, grad_logsumexp, temperature, ignore_index
):
    arguments = (
        targets,
        parts,
        entropy,
        (grad_logps, grad_entropy, grad_logsumexp),
        temperature,
        ignore_index,
    )
    if runs_kernels(logits) and kernels.rows_of(logits) is not None:
        kernels.backward(logits, *arguments, out=logits)
    else:
        logits.copy_(_gradient(logits, *arguments[:3], *arguments[3], *arguments[4:]))


def _fake_gradient_in_place(logits, *_):  # type: ignore[no-untyped-def]
    return None


_backward_inplace = operator(
    "token_logprobs_backward_",
    _gradient_in_place,
    _fake_gradient_in_place,
    schema=f"(Tensor(a!) logits, {_BACKWARD_ARGUMENTS}) -> ()",
    mutates=("logits",),
)
