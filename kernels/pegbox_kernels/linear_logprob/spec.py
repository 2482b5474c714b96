"""The record of the operations: what their tests compare and their benchmark measures.

N  rows    H  hidden size    V  vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from pegbox_kernels.harness.opspec import Cost, Inputs, Make, OpSpec, Outputs, Sample, Workload
from pegbox_kernels.linear_logprob import linear_cross_entropy, linear_token_logprobs, reference

FROZEN = ("weight", "bias")


def _make(
    rows: int,
    width: int,
    vocab: int,
    *,
    bias: bool = False,
    ignored: float = 0.0,
    weighted: bool = False,
    strided: bool = False,
    spread: float = 2.0,
    bytes_of_rows: int | None = None,
    **given: object,
) -> Make:
    """Normal hidden states and weights whose logits have standard deviation `spread`; a budget of so many rows."""

    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(rows + vocab)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32, device=device)

        hidden, weight = normal(rows, width), normal(vocab, width).mul_(spread / width**0.5)
        if strided:
            hidden, weight = hidden.T.contiguous().T, torch.cat((weight, weight), 1)[:, :width]
        targets = torch.randint(vocab, (rows,), generator=generator, device=device)
        if ignored:
            targets[torch.rand(rows, generator=generator, device=device) < ignored] = -100
        inputs: Inputs = {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "targets": targets, **given}
        if bias:
            inputs["bias"] = normal(vocab).to(dtype)
        if weighted:
            inputs["token_weights"] = torch.rand(rows, generator=generator, device=device)
        if bytes_of_rows:
            inputs["logits_bytes"] = bytes_of_rows * (vocab + 63) // 64 * 64 * dtype.itemsize
        return inputs

    return make


def _logps(  # type: ignore[no-untyped-def]
    hidden, weight, targets, bias=None, *, only_logps=False, logits_bytes=None, plain=False, **given
) -> Outputs:
    """The operation, or its reference; `only_logps`: only they are differentiated, as by most losses."""
    if plain:
        given = {name: value for name, value in given.items() if name not in ("uniform", "entropy_gradient")}
        found: Outputs = reference.linear_token_logprobs(hidden, weight, targets, bias, **given)
    else:
        found = linear_token_logprobs(hidden, weight, targets, bias_V=bias, logits_bytes=logits_bytes, **given)
    if not only_logps:
        return found
    logps, *others = found
    return logps, *(None if other is None else other.detach() for other in others)


def _summed(hidden, weight, targets, bias=None, token_weights=None, *, logits_bytes=None, **given) -> Outputs:  # type: ignore[no-untyped-def]
    more = {"bias_V": bias, "token_weights_N": token_weights, "logits_bytes": logits_bytes}
    return linear_cross_entropy(hidden, weight, targets, **more, **given)


def _summed_reference(hidden, weight, targets, bias=None, token_weights=None, *, logits_bytes=None, **given) -> Outputs:  # type: ignore[no-untyped-def]
    return reference.linear_cross_entropy(hidden, weight, targets, bias, token_weights, **given)


def _sample(name: str, make: Make, frozen: bool = False) -> Sample:
    return Sample(name=name, make=make, frozen=FROZEN if frozen else ())


SAMPLES = (
    _sample("vocabulary of 1", _make(3, 5, 1)),
    _sample("vocabulary of 63, entropy, two chunks", _make(5, 40, 63, entropy=True, bytes_of_rows=3)),
    _sample("vocabulary of 1000, temperature and scale", _make(5, 64, 1000, temperature=0.7, scale=1.5)),
    _sample("soft cap, entropy", _make(5, 64, 777, softcap=3.0, temperature=1.3, scale=0.5, entropy=True, spread=8.0)),
    _sample("bias, some ignored", _make(8, 33, 300, bias=True, ignored=0.4, entropy=True, bytes_of_rows=4)),
    _sample("bias, soft cap", _make(16, 33, 130, bias=True, softcap=2.0)),
    _sample("every row ignored", _make(3, 16, 100, ignored=1.0)),
    _sample("no rows", _make(0, 16, 100, entropy=True)),
    _sample("one row, odd vocabulary of 50257", _make(1, 8, 50257)),
    _sample("vocabulary of 262144", _make(1, 4, 262144, entropy=True)),
    _sample("strided operands", _make(5, 48, 257, strided=True)),
    _sample("sharp distributions", _make(4, 16, 500, spread=30.0, entropy=True)),
    _sample("frozen, only logps", _make(6, 64, 1000, only_logps=True, bytes_of_rows=4), frozen=True),
    _sample("frozen, only logps, soft cap", _make(6, 64, 515, only_logps=True, softcap=4.0, bias=True), frozen=True),
    _sample("frozen, logps, entropy and logsumexp", _make(6, 64, 515, entropy=True, ignored=0.3), frozen=True),
    _sample("entropy's gradient foreseen", _make(5, 32, 200, entropy=True, entropy_gradient=True), frozen=True),
    _sample("uniform promised, and not kept", _make(5, 32, 200, uniform=True)),
)

SUMMED_SAMPLES = (
    _sample("plain", _make(6, 48, 300, bytes_of_rows=4)),
    _sample("token weights, some ignored", _make(8, 48, 123, weighted=True, ignored=0.4)),
    _sample("label smoothing, z-loss", _make(6, 48, 400, label_smoothing=0.1, z_loss=1e-2)),
    _sample("smoothing, cap, bias", _make(6, 48, 130, label_smoothing=0.3, softcap=3.0, bias=True, scale=0.8)),
    _sample("z-loss, frozen", _make(6, 48, 130, z_loss=0.1, temperature=1.7, weighted=True), frozen=True),
    _sample("no rows", _make(0, 16, 100)),
)


def _workload(rows: int, width: int, vocab: int, frozen: bool) -> Workload:
    """One product forward, one backward for hidden, one for the weight; operands and gradients moved once."""
    product = 2 * rows * width * vocab
    hidden, weight = 2 * rows * width, 2 * vocab * width
    return Workload(
        name=f"{rows}x{width}x{vocab} bfloat16, {'frozen' if frozen else 'trained'} head",
        dtype=torch.bfloat16,
        make=_make(rows, width, vocab, spread=1.0),
        forward=Cost(bytes_moved=hidden + weight, flops=product),
        backward=Cost(bytes_moved=2 * hidden + (1 if frozen else 2) * weight, flops=product * (1 if frozen else 2)),
        frozen=FROZEN if frozen else (),
    )


WORKLOADS = tuple(
    _workload(*shape, frozen)
    for shape in ((16384, 2880, 201088), (8192, 4096, 128256), (8192, 2880, 201088))
    for frozen in (True, False)
)


def _eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
    """What trainers write: all logits, log_softmax in fp32."""
    logits = torch.nn.functional.linear(hidden, weight).float()
    return (torch.nn.functional.cross_entropy(logits, targets, reduction="sum"),)


def _ours(hidden: Tensor, weight: Tensor, targets: Tensor, **given: object) -> Outputs:
    return (linear_cross_entropy(hidden, weight, targets, **given).loss_sum,)  # type: ignore[arg-type]


def _our_logps(hidden: Tensor, weight: Tensor, targets: Tensor, uniform: bool) -> Outputs:
    return (-linear_token_logprobs(hidden, weight, targets, uniform=uniform).logps.sum(),)


def _contenders(inputs: Inputs) -> Mapping[str, Callable[[], Outputs]]:
    found: dict[str, Callable[..., Outputs]] = {
        "pegbox": _ours,
        "pegbox, 128 MiB": partial(_ours, logits_bytes=128 << 20),
        "pegbox, logps, uniform": partial(_our_logps, uniform=True),
        "pegbox, logps": partial(_our_logps, uniform=False),
        "torch": _eager,
        "torch.compile": torch.compile(_eager, dynamic=False),
    }
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError:
        pass
    else:

        def liger(hidden: Tensor, weight: Tensor, targets: Tensor, total: torch.dtype | None = None) -> Outputs:
            options = (None, None, -100, 0.0, 0.0, "sum", None, False, total)
            return (LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets, *options)[0],)

        found["liger"] = liger
        found["liger, fp32 sums"] = partial(liger, total=torch.float32)
    try:
        from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy
    except ImportError:
        pass
    else:

        def cut(hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
            return (cut_cross_entropy(hidden, weight, targets, reduction="sum"),)

        found["cut-cross-entropy"] = cut
    return {name: partial(contender, **inputs) for name, contender in found.items()}


def _variants(inputs: Inputs) -> Mapping[str, Callable[[], object]]:
    """One pass on a chunk of a frozen head, two passes and the backward on one of a trained head; whole budgets."""
    from pegbox_kernels.linear_logprob import triton as kernels
    from pegbox_kernels.linear_logprob.launch import Launch
    from pegbox_kernels.linear_logprob.rows import Coefficients, Objective, Rows, Rule, part

    hidden, weight, targets = inputs["hidden"], inputs["weight"], inputs["targets"]
    logits = (hidden[:4096] @ weight.T).contiguous()
    rule, ones = Rule(1.0, 0.0, 1.0, -100), torch.ones(len(logits), device=hidden.device)
    made = Rows.new(len(logits), hidden.device, entropy=False, mean=False, hits=True, factors=True)
    coefficients = Coefficients(made.largest_N, made.log_total_N, ones, ones[:0], ones)

    def forward(count: int, one_pass: bool, *settings: int) -> Callable[[], object]:
        rows = Rows(*part(made, slice(count)))
        rows = rows if one_pass else rows._replace(factors_N=ones[:0])
        arguments = (logits[:count], None, targets[:count], rule, Objective(), rows, True)
        return partial(kernels.forward, *arguments, launch=Launch(*settings))

    found: dict[str, Callable[[], object]] = {}
    for warps, loads in ((4, 2), (4, 4), (8, 2), (8, 4), (16, 2), (16, 4)):
        programs = 132 * 64 // warps
        found[f"once      2048 rows, {warps} x {loads} x {programs}"] = forward(2048, True, warps, loads, programs)
    for warps, loads, programs in ((16, 4, 65), (16, 4, 99), (16, 4, 132), (16, 2, 132), (32, 2, 99), (32, 2, 132)):
        found[f"twice     4096 rows, {warps} x {loads} x {programs}"] = forward(4096, False, warps, loads, programs)
    for warps, loads in ((4, 4), (8, 2), (8, 4), (16, 2)):
        launch = Launch(warps, loads, 132 * 64 // warps)
        call = partial(kernels.backward, logits, None, targets[:4096], rule, coefficients, launch=launch)
        found[f"backward  4096 rows, {warps} x {loads} x {launch.programs}"] = call
    operands = {"hidden": hidden.requires_grad_(), "targets": targets}
    for trained, budgets in ((False, (128, 440, 880)), (True, (820, 1640))):
        whole = {**operands, "weight": weight.detach().requires_grad_(trained)}
        for mebibytes in budgets:
            name = f"whole     {'trained' if trained else 'frozen'}, {mebibytes} MiB"
            found[name] = partial(_ours, **whole, logits_bytes=mebibytes << 20)
    return found


SPEC = OpSpec(
    name="linear_logprob",
    source="gradients in the forward: mgmalek/efficient_cross_entropy and Liger, arXiv:2410.10989; the rest: README.md",
    op=_logps,
    reference=partial(_logps, plain=True),
    differentiable=("hidden", "weight", "bias"),
    outputs=("logps", "entropy", "logsumexp"),
    samples=SAMPLES,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    workloads=WORKLOADS,
    contenders=_contenders,
    variants=_variants,
)

SUMMED = OpSpec(
    name="linear_cross_entropy",
    source=SPEC.source,
    op=_summed,
    reference=_summed_reference,
    differentiable=SPEC.differentiable,
    outputs=("loss_sum", "count", "z_loss_sum", "correct"),
    samples=SUMMED_SAMPLES,
    dtypes=(torch.float32,),
    workloads=WORKLOADS,
    contenders=_contenders,
)
"""The loss. In fp32 alone: in bf16 the errors of plain PyTorch's sum cancel by chance, which is no measure."""
