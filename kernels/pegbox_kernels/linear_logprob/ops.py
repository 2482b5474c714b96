"""The registered operators: what is computed in the forward, kept, scaled in the backward, or computed again.

The gradient of a token's logp by its hidden state, g_n = scale / temperature (w_t - sum_v p_v w_v), does not depend on
what the loss makes of the logp: the backward needs c_n g_n. So `linear_logps` makes g_n in its forward, where the
logits are (`unit_x`). The gradient of the weight, sum_n c_n (e_t - p)_n x_n, mixes rows with c_n: it can be made in
the forward (`unit_w`) only if all c_n are one number, which the caller promises and the backward checks by the strides
of what arrives: the gradient of a sum is one number expanded. Whatever else arrives, an entropy's gradient or unequal
c_n, the logits are computed again with the true coefficients.

Operators are opaque to torch.compile. Outputs that are empty were not asked for. A second derivative raises: the
operators of the backward have none.

N  rows    H  hidden size    V  vocabulary
"""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from pegbox_kernels.dispatch import runs_kernels, values_at_hand
from pegbox_kernels.linear_logprob import plain
from pegbox_kernels.linear_logprob.chunks import Products, run
from pegbox_kernels.linear_logprob.rows import Coefficients, Objective, Rows, Rule, part

if importlib.util.find_spec("triton") is not None:
    from pegbox_kernels.linear_logprob import triton as kernels
else:
    kernels = None  # type: ignore[assignment]

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets"
_RULE = "float scale, float softcap, float temperature, int ignore_index"
_COST = "ScalarType dtype, int logits_bytes"
_KEEP = "bool keep_x, bool keep_w, bool keep_b"


def _way(tensor: Tensor) -> ModuleType:
    return kernels if runs_kernels(tensor) else plain


def _products(
    hidden: Tensor, weight: Tensor, dtype: torch.dtype, keep: tuple[bool, bool, bool], dx: torch.dtype = torch.float32
) -> Products:
    """Operands in `dtype`, and room for the gradients that are wanted; what will be scaled is not rounded before."""
    rows, width = hidden.shape
    vocab = weight.shape[0]

    def made(wanted: bool, shape: tuple[int, ...], kind: torch.dtype) -> Tensor | None:
        return torch.empty(shape, dtype=kind, device=hidden.device) if wanted else None

    return Products(
        hidden_NH=hidden.to(dtype),
        weight_VH=weight.to(dtype),
        dx_NH=made(keep[0], (rows, width), dx),
        dw_VH=made(keep[1], (vocab, width), torch.float32),
        db_V=made(keep[2], (vocab,), torch.float32),
    )


def _gradients(products: Products) -> tuple[Tensor, Tensor, Tensor]:
    empty = products.hidden_NH.new_empty
    wanted = (products.dx_NH, products.dw_VH, products.db_V)
    made = [empty(0) if tensor is None else tensor for tensor in wanted]
    return made[0], made[1], made[2]


def _forward(products: Products, bias, targets, rule, objective, rows, logits_bytes) -> None:  # type: ignore[no-untyped-def]
    if values_at_hand(targets):
        _check_ids(targets, products.weight_VH.shape[0], rule.ignore_index)
    targets = targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    weights = objective.token_weights_N
    weights = None if weights is None else weights.contiguous()
    way = _way(products.hidden_NH)

    def softmax(logits_CV: Tensor, of_all: slice) -> None:
        wanted = objective if weights is None else objective._replace(token_weights_N=weights[of_all])
        way.forward(logits_CV, bias, targets[of_all], rule, wanted, Rows(*part(rows, of_all)), products.gradient)

    run(products, softmax, logits_bytes, rows.factors_N if rows.factors_N.numel() else None)


def _in_one_pass(products: Products, objective: Objective, entropy: bool) -> bool:
    """Whether the softmax may leave a factor of each row to the product with the head.

    Not with a trained head: the factors would be those of the rows of hidden states, which would be rounded once more.
    """
    if entropy or products.dx_NH is None or products.dw_VH is not None or products.db_V is not None:
        return False
    return _way(products.hidden_NH) is kernels and kernels.one_pass.serves(products.hidden_NH.dtype, objective)


def _check_ids(targets: Tensor, vocab: int, ignore_index: int) -> None:
    wrong = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
    if wrong.any():
        raise ValueError(
            f"target {targets[wrong][0].item()} is outside the vocabulary of {vocab} and is not ignore_index "
            f"({ignore_index}). The tokenizer has more tokens than the head has rows, or targets are no ids."
        )


@torch.library.custom_op(
    "pegbox_kernels::linear_logps",
    mutates_args=(),
    schema=f"({_HEAD}, {_RULE}, {_COST}, bool entropy, {_KEEP}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_logps(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
    targets,
    scale,
    softcap,
    temperature,
    ignore_index,
    dtype,
    logits_bytes,
    entropy,
    keep_x,
    keep_w,
    keep_b,
):
    """logps, entropy, logsumexp, parts (2, N), and the gradients of the sum of logps that are to be kept."""
    products = _products(hidden, weight, dtype, (keep_x, keep_w, keep_b))
    objective = Objective(factor=-1.0)
    factors = _in_one_pass(products, objective, entropy)
    rows = Rows.new(hidden.shape[0], hidden.device, entropy=entropy, mean=False, hits=False, factors=factors)
    rule = Rule(scale, softcap, temperature, ignore_index)
    _forward(products, bias, targets, rule, objective, rows, logits_bytes)
    parts = torch.stack((rows.largest_N, rows.log_total_N))
    return rows.logps_N, rows.entropy_N, rows.logsumexp_N, parts, *_gradients(products)


@linear_logps.register_fake
def _(hidden, weight, bias, targets, *rest):  # type: ignore[no-untyped-def]
    dtype, _, entropy, *keep = rest[4:]
    rows = hidden.shape[0]

    def result(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    gradients = _gradients(_products(hidden, weight, dtype, keep))
    return result(rows), result(rows if entropy else 0), result(rows), result(2, rows), *gradients


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, bias, targets, *ctx.rule = inputs[:8]
    *ctx.cost, asked, _, _, _ = inputs[8:]
    ctx.keep = inputs[-3:]
    _, entropy, _, parts, *units = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(parts, *units, *(() if asked else (entropy,)))
    ctx.save_for_backward(hidden, weight, bias, targets, parts, entropy, *units)


def _differentiate(ctx, grad_logps, grad_entropy, grad_logsumexp, *_):  # type: ignore[no-untyped-def]
    hidden, weight, bias, targets, parts, entropy, *units = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    unused = (None,) * 11
    if grad_logps is None and grad_entropy is None and grad_logsumexp is None:
        return None, None, None, *unused
    known = grad_entropy is None and grad_logsumexp is None
    known = known and all(kept or not needed for kept, needed in zip(ctx.keep, need, strict=True))
    if known and (_one_number(grad_logps) or not (need[1] or need[2])):
        dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        return *_scaled(units, (grad_logps, _first(grad_logps)), dtypes, need), *unused
    grads = (grad_logps, grad_entropy, grad_logsumexp)
    made = _backward(hidden, weight, bias, targets, parts, entropy, *grads, *ctx.rule, *ctx.cost, *need)
    return *(grad if needed else None for grad, needed in zip(made, need, strict=True)), *unused


def _one_number(grad: Tensor) -> bool:
    """Whether a gradient is one number expanded, as that of a sum is. No device is asked."""
    return grad.numel() <= 1 or not any(grad.stride())


def _first(grad: Tensor) -> Tensor:
    """The number that was expanded; zero dimensions."""
    return grad[0] if grad.numel() else grad.new_zeros(())


linear_logps.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op(
    "pegbox_kernels::linear_logps_backward",
    mutates_args=(),
    schema=f"({_HEAD}, Tensor parts, Tensor entropy, Tensor? grad_logps, Tensor? grad_entropy, "
    f"Tensor? grad_logsumexp, {_RULE}, {_COST}, {_KEEP}) -> (Tensor, Tensor, Tensor)",
)
def _backward(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
    targets,
    parts,
    entropy,
    grad_logps,
    grad_entropy,
    grad_logsumexp,
    scale,
    softcap,
    temperature,
    ignore_index,
    dtype,
    logits_bytes,
    keep_x,
    keep_w,
    keep_b,
):
    """The gradients of hidden, weight and bias, from logits that are computed again."""
    products = _products(hidden, weight, dtype, (keep_x, keep_w, keep_b), dtype)
    rule = Rule(scale, softcap, temperature, ignore_index)
    zero = parts.new_zeros(parts.shape[1])
    at_target = zero if grad_logps is None else grad_logps.contiguous()
    constant = -at_target if grad_logsumexp is None else grad_logsumexp - at_target
    slope = parts.new_empty(0)
    if grad_entropy is not None:
        constant = constant - grad_entropy * entropy
        slope = -grad_entropy
    coefficients = Coefficients(parts[0], parts[1], constant, slope.contiguous(), at_target)
    targets = targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    way = _way(hidden)

    def softmax(logits_CV: Tensor, of_all: slice) -> None:
        way.backward(logits_CV, bias, targets[of_all], rule, Coefficients(*part(coefficients, of_all)))

    run(products, softmax, logits_bytes)
    return _in_dtypes(products, hidden, weight, bias)


def _in_dtypes(products: Products, hidden: Tensor, weight: Tensor, bias: Tensor | None):  # type: ignore[no-untyped-def]
    """The gradients in the dtypes of what they belong to."""
    dx, dw, db = _gradients(products)
    return dx.to(hidden.dtype), dw.to(weight.dtype), db.to(db.dtype if bias is None else bias.dtype)


@_backward.register_fake
def _(hidden, weight, bias, *rest):  # type: ignore[no-untyped-def]
    dtype, _, *keep = rest[10:]
    return _in_dtypes(_products(hidden, weight, dtype, keep, dtype), hidden, weight, bias)


@torch.library.custom_op(
    "pegbox_kernels::linear_nll",
    mutates_args=(),
    schema=f"({_HEAD}, {_RULE}, {_COST}, Tensor? token_weights, float smoothing, float z_loss, {_KEEP}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_nll(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
    targets,
    scale,
    softcap,
    temperature,
    ignore_index,
    dtype,
    logits_bytes,
    token_weights,
    smoothing,
    z_loss,
    keep_x,
    keep_w,
    keep_b,
):
    """Sum of the loss, count, z-loss in it, count of right predictions, and the gradients of the sum to be kept."""
    products = _products(hidden, weight, dtype, (keep_x, keep_w, keep_b))
    objective = Objective(1.0, token_weights, smoothing, z_loss)
    factors = _in_one_pass(products, objective, False)
    rows = Rows.new(hidden.shape[0], hidden.device, entropy=False, mean=smoothing > 0, hits=True, factors=factors)
    rule = Rule(scale, softcap, temperature, ignore_index)
    _forward(products, bias, targets, rule, objective, rows, logits_bytes)
    weights = (targets != ignore_index).float()
    if token_weights is not None:
        weights = torch.where(weights > 0, token_weights.float(), 0.0)
    nll = rows.logps_N * (smoothing - 1)
    if smoothing > 0:
        nll = nll - smoothing * rows.mean_logp_N
    z_sum = torch.dot(weights, rows.logsumexp_N.square()) * z_loss
    return torch.dot(weights, nll) + z_sum, weights.sum(), z_sum, torch.dot(weights, rows.hits_N), *_gradients(products)


@linear_nll.register_fake
def _(hidden, weight, bias, targets, *rest):  # type: ignore[no-untyped-def]
    dtype, _, _, _, _, *keep = rest[4:]
    sums = [torch.empty((), dtype=torch.float32, device=hidden.device) for _ in range(4)]
    return *sums, *_gradients(_products(hidden, weight, dtype, keep))


def _save_units(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
    ctx.save_for_backward(*output[4:])


def _scale_units(ctx, grad_sum, *_):  # type: ignore[no-untyped-def]
    unused = (None,) * 13
    if grad_sum is None:
        return None, None, None, *unused
    return *_scaled(ctx.saved_tensors, (grad_sum, grad_sum), ctx.dtypes, ctx.needs_input_grad[:3]), *unused


linear_nll.register_autograd(_scale_units, setup_context=_save_units)


def _scaled(units, factors: tuple[Tensor, Tensor], dtypes, needed):  # type: ignore[no-untyped-def]
    """The kept gradients times their factors (of rows of x; of weight and bias), in their dtypes; None: not needed.

    In place, and so once only, for a weight that is fp32: its gradient is gigabytes. Autograd refuses a second
    backward then, because a saved tensor has changed. A traced graph may not change what its forward saved.
    """
    of_rows, of_all = factors
    found = [_scale(units[0], of_rows, dtypes[0]) if needed[0] else None, None, None]
    if needed[1] and dtypes[1] == torch.float32 and type(units[1]) is Tensor:
        _scale_in_place(units[1], of_all)
        found[1] = units[1]
    elif needed[1]:
        found[1] = _scale(units[1], of_all, dtypes[1])
    if needed[2]:
        found[2] = _scale(units[2], of_all, dtypes[2])
    return found


def _two_dimensions(unit: Tensor) -> Tensor:
    return unit if unit.ndim == 2 else unit.view(1, -1)


@torch.library.custom_op(
    "pegbox_kernels::scale_rows", mutates_args=(), schema="(Tensor unit, Tensor factors, ScalarType dtype) -> Tensor"
)
def _scale(unit, factors, dtype):  # type: ignore[no-untyped-def]
    out = torch.empty(unit.shape, dtype=dtype, device=unit.device)
    _way(unit).scale(_two_dimensions(unit), factors, _two_dimensions(out))
    return out


@_scale.register_fake
def _(unit, factors, dtype):  # type: ignore[no-untyped-def]
    return torch.empty(unit.shape, dtype=dtype, device=unit.device)


@torch.library.custom_op(
    "pegbox_kernels::scale_rows_", mutates_args=("unit",), schema="(Tensor(a!) unit, Tensor factors) -> ()"
)
def _scale_in_place(unit, factors):  # type: ignore[no-untyped-def]
    _way(unit).scale(_two_dimensions(unit), factors, _two_dimensions(unit))


@_scale_in_place.register_fake
def _(unit, factors):  # type: ignore[no-untyped-def]
    return None
