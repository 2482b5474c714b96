"""The record of the operation: what its tests compare and its benchmark measures.

Workloads whose weight is frozen are those of training with adapters: the gradient of the weight is not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from pegbox_kernels.harness.opspec import Cost, Inputs, Make, OpSpec, Outputs, Sample, Workload
from pegbox_kernels.rms_norm import reference, rms_norm

Layout = Callable[[Tensor], Tensor]


def _make(
    shape: tuple[int, ...],
    *,
    offset: float = 0.0,
    cast: str = "llama",
    eps: float = 1e-6,
    gate: bool = False,
    residual: bool = False,
    weight: torch.dtype | bool | None = None,
    spread: float = 1.0,
    layout: Layout | None = None,
) -> Make:
    """Normal rows; a weight around 1 - offset, in the dtype of the rows unless another is given; False: none."""

    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(sum(shape))

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float32, device=device)

        def rows() -> Tensor:
            made = normal(*shape).mul_(spread).to(dtype)
            return layout(made) if layout else made

        x = rows()
        scale = normal(x.shape[-1]).mul_(0.3).add_(1 - offset)
        return {
            "x": x,
            "weight": None if weight is False else scale.to(weight if isinstance(weight, torch.dtype) else dtype),
            "eps": eps,
            "offset": offset,
            "cast": cast,
            "gate": rows() if gate else None,
            "residual": rows() if residual else None,
        }

    return make


def _far_apart(x: Tensor) -> Tensor:
    """The same rows 1.1e9 elements apart: offsets do not fit 32 bits. Nothing between is ever touched."""
    rows, hidden = x.shape
    distance = 1_100_000_000
    room = torch.empty(distance * (rows - 1) + hidden, dtype=x.dtype, device=x.device)
    return room.as_strided((rows, hidden), (distance, 1)).copy_(x)


GEMMA = {"offset": 1.0, "cast": "gemma"}
SAMPLES = tuple(
    Sample(name=name, make=make)
    for name, make in {
        "rows of 1": _make((5, 1)),
        "rows of 63": _make((2, 3, 63)),
        "rows of 123, gemma": _make((7, 123), **GEMMA),
        "rows of 1000": _make((6, 1000)),
        "rows of 2880, gemma cast without offset": _make((5, 2880), cast="gemma", weight=torch.float32),
        "rows of 4096": _make((3, 4096)),
        "largest rows": _make((2, 16384)),
        "heads of 128, more rows than programs": _make((3, 19, 5, 128)),
        "fp32 weight": _make((4, 300), weight=torch.float32),
        "offset, rounded before the weight": _make((4, 300), offset=1.0),
        "one row": _make((128,)),
        "no rows": _make((0, 4, 64)),
        "large eps": _make((3, 100), eps=0.5, spread=0.1),
        "tiny rows": _make((3, 100), spread=1e-4),
        "heads of a packed projection": _make((2, 5, 12, 64), layout=lambda x: x[:, :, 2:6]),
        "half of each row": _make((4, 6, 256), layout=lambda x: x[..., :128]),
        "three strides": _make((4, 6, 8, 32), layout=lambda x: x[:, ::2, ::3]),
        "rows not the fastest": _make((64, 9), layout=lambda x: x.t()),
        "rows 1.1e9 elements apart": _make((3, 100), layout=_far_apart),
        "gate": _make((40, 128), gate=True),
        "gate, fp32 weight": _make((5, 123), gate=True, weight=torch.float32),
        "gate, gemma": _make((3, 4, 200), gate=True, **GEMMA),
        "gate in half of each row": _make((3, 6, 128), gate=True, layout=lambda x: x[..., 64:]),
        "residual": _make((3, 2880), residual=True),
        "residual, gemma": _make((2, 5, 63), residual=True, **GEMMA),
        "residual, strided": _make((4, 6, 100), residual=True, layout=lambda x: x[:, 1:]),
        "gate and residual": _make((5, 300), gate=True, residual=True),
        "no weight": _make((9, 128), weight=False),
        "no weight, gemma": _make((4, 77), weight=False, **GEMMA),
    }.items()
) + tuple(
    Sample(name=f"{name}, frozen weight", make=make, frozen=("weight",))
    for name, make in {"rows of 2880": _make((5, 2880)), "gate": _make((70, 128), gate=True)}.items()
)


def _pair(found: Tensor | tuple[Tensor, Tensor]) -> Outputs:
    return found if isinstance(found, tuple) else (found, None)


def _workload(
    name: str, shape: tuple[int, ...], *, gate: bool = False, residual: bool = False, frozen: bool = False, **kind: Any
) -> Workload:
    """Forward reads and writes a row (and what comes beside it) once; backward reads two and writes one, or more."""
    dtype, numbers = torch.bfloat16, prod(shape)
    tensor, per_row = numbers * dtype.itemsize, 4 * numbers // shape[-1]
    return Workload(
        name=f"{name} {'x'.join(map(str, shape))}{', frozen weight' if frozen else ''}",
        dtype=dtype,
        make=_make(shape, gate=gate, residual=residual, **kind),
        forward=Cost(bytes_moved=tensor * (2 + gate + 2 * residual) + per_row, flops=numbers * (4 + 4 * gate)),
        backward=Cost(bytes_moved=tensor * (3 + 2 * gate + residual) + per_row, flops=numbers * (9 + 8 * gate)),
        frozen=("weight",) if frozen else (),
    )


WORKLOADS = (
    _workload("Llama-8B", (8192, 4096)),
    _workload("Llama-8B", (8192, 4096), frozen=True),
    _workload("gpt-oss", (8192, 2880), cast="gemma"),
    _workload("Qwen3-8B q_norm", (8192, 32, 128)),
    _workload("Gemma-3-27B", (8192, 5376), **GEMMA),
    _workload("Llama-8B + residual", (8192, 4096), residual=True),
    _workload("Qwen3-Next gated", (8192, 32, 128), gate=True),
)


def _eager(**inputs: Any) -> Outputs:
    """What transformers computes, operation by operation, for every kind of call."""
    return tuple(out for out in reference.rms_norm(**inputs) if out is not None)


def _ours(**inputs: Any) -> Outputs:
    return tuple(out for out in _pair(rms_norm(**inputs)) if out is not None)


def _contenders(inputs: Inputs) -> Mapping[str, Callable[[], Outputs]]:
    found: dict[str, Callable[..., Outputs]] = {
        "pegbox": _ours,
        "torch": _eager,
        "torch.compile": torch.compile(_eager, dynamic=False),
    }
    if inputs["gate"] is None and inputs["residual"] is None:
        found |= {"torch rms_norm": _torch_fused} if inputs["offset"] == 0 and inputs["cast"] == "llama" else {}
        found |= _liger_plain() | (_quack_plain() if inputs["offset"] == 0 else {})
    elif inputs["gate"] is None:
        found |= _liger_added()
    return {name: partial(contender, **inputs) for name, contender in found.items()}


def _torch_fused(x: Tensor, weight: Tensor, eps: float, **_: object) -> Outputs:
    return (torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps),)


def _liger_plain() -> dict[str, Callable[..., Outputs]]:
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except ImportError:
        return {}

    def liger(x: Tensor, weight: Tensor, eps: float, offset: float, cast: str, **_: object) -> Outputs:
        return (LigerRMSNormFunction.apply(x, weight, eps, offset, cast, False, None),)

    return {"liger": liger}


def _liger_added() -> dict[str, Callable[..., Outputs]]:
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    except ImportError:
        return {}

    def liger(
        x: Tensor, weight: Tensor, eps: float, offset: float, cast: str, residual: Tensor, **_: object
    ) -> Outputs:
        return tuple(LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, offset, cast, False))

    return {"liger, fused add": liger}


def _quack_plain() -> dict[str, Callable[..., Outputs]]:
    try:
        from quack import rmsnorm
    except ImportError:
        return {}

    def quack(x: Tensor, weight: Tensor, eps: float, **_: object) -> Outputs:
        return (rmsnorm(x, weight, eps=eps),)

    return {"quack": quack}


def _variants(inputs: Inputs) -> Mapping[str, Callable[[], object]]:
    """Both kernels under launch settings around the default."""
    from pegbox_kernels.rms_norm import triton as kernels

    x, weight, gate, residual = (inputs[name] for name in ("x", "weight", "gate", "residual"))
    gemma, offset, hidden = inputs["cast"] == "gemma", inputs["offset"], inputs["x"].shape[-1]
    kind = (x, weight, gate, residual, inputs["eps"], offset, gemma, x.dtype)
    y, total, rstd = kernels.forward(*kind)
    h = x if residual is None else total
    saved = (y, None if residual is None else y, h, weight, gate, rstd, offset, gemma)
    found: dict[str, Callable[[], object]] = {}
    short = hidden <= 512
    for warps, rows in product((2, 4, 8, 16), (4, 8, 16, 32) if short else (1, 2)):
        launch = kernels.Launch(rows, warps, 1)
        found[f"forward  {rows} rows, {warps} warps"] = partial(kernels.forward, *kind, launch=launch)
        frozen = partial(kernels.backward, *saved, False, launch=launch)
        found[f"frozen   {rows} rows, {warps} warps"] = frozen
        for programs in (1, 2, 4, 8):
            launch = kernels.Launch(rows, warps, programs)
            name = f"backward {rows} rows, {warps} warps, {programs} per multiprocessor"
            found[name] = partial(kernels.backward, *saved, True, launch=launch)
    return found


SPEC = OpSpec(
    name="rms_norm",
    source="arXiv:1910.07467; roundings as in transformers' Llama, Gemma and Qwen3-Next",
    op=lambda **inputs: _pair(rms_norm(**inputs)),
    reference=reference.rms_norm,
    differentiable=("x", "weight", "gate", "residual"),
    outputs=("y", "total"),
    samples=SAMPLES,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    workloads=WORKLOADS,
    contenders=_contenders,
    variants=_variants,
)
