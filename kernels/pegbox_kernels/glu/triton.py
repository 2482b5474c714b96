"""The Triton kernels: gate and up are read once and the result written once; backward reads three and writes two.

Backward makes the activation anew from gate and up, so nothing else is kept for it. A program takes BLOCK columns of a
row. Two tensors without gaps are one long row; halves of a packed tensor are rows of two strides; interleaved pairs
(gpt-oss) are read as one run of 2 BLOCK numbers whose neighbours are split in registers, so every load and store is of
16 bytes. Addresses are 64-bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pegbox_kernels.dispatch import on_device_of, quotient
from pegbox_kernels.launching import repeatable
from pegbox_kernels.logprob.triton import rows_of
from pegbox_kernels.rms_norm.triton import _as


class Launch(NamedTuple):
    """How a kernel is launched: columns of a program, and its warps."""

    block: int
    warps: int


FORWARD, BACKWARD = Launch(2048, 4), Launch(1024, 4)
"""Sixteen or eight numbers of each tensor for a thread."""


def default_launch(columns: int, *, backward: bool = False) -> Launch:
    """Fewer columns and warps where a row has no more."""
    block, warps = BACKWARD if backward else FORWARD
    while block > 128 and block // 2 >= columns:
        block, warps = block // 2, max(1, warps // 2)
    return Launch(block, warps)


@triton.jit
def _activated(g, ACTIVATION: tl.constexpr, alpha):
    """The activation and its slope."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(g)
        return g * s, s * (1.0 + g * (1.0 - s))
    if ACTIVATION == "clamped":
        s = tl.sigmoid(alpha * g)
        return g * s, s * (1.0 + alpha * g * (1.0 - s))
    if ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        return g * s, s + g * s * (1.0 - s) * (1.5957691216057308 + 0.21406774629277 * g * g)
    phi = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
    return g * phi, phi + g * tl.exp(-0.5 * g * g) * 0.3989422804014327


@repeatable
@triton.jit
def forward_kernel(
    gate,
    up,
    y,
    columns,
    gate_stride,
    up_stride,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    begin = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    cols = begin + tl.arange(0, BLOCK)
    if PACKED:
        both = 2 * begin + tl.arange(0, 2 * BLOCK)
        pairs = tl.load(gate + row * gate_stride + both, mask=both < 2 * columns, other=0.0).to(tl.float32)
        g, u = tl.split(tl.reshape(pairs, [BLOCK, 2]))
    else:
        g = tl.load(gate + row * gate_stride + cols, mask=cols < columns, other=0.0).to(tl.float32)
        u = tl.load(up + row * up_stride + cols, mask=cols < columns, other=0.0).to(tl.float32)
    if ACTIVATION == "clamped":
        g = tl.where(g > limit, limit, g)
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u)) + 1.0
    act, _ = _activated(g, ACTIVATION, alpha)
    tl.store(y + row * columns + cols, _as(act * u, y.dtype.element_ty), mask=cols < columns)


@repeatable
@triton.jit
def backward_kernel(
    grad,
    gate,
    up,
    grad_gate,
    grad_up,
    columns,
    grad_stride,
    gate_stride,
    up_stride,
    out_stride,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    begin = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    cols = begin + tl.arange(0, BLOCK)
    inside = cols < columns
    both = 2 * begin + tl.arange(0, 2 * BLOCK)
    d = tl.load(grad + row * grad_stride + cols, mask=inside, other=0.0).to(tl.float32)
    if PACKED:
        pairs = tl.load(gate + row * gate_stride + both, mask=both < 2 * columns, other=0.0).to(tl.float32)
        g, u = tl.split(tl.reshape(pairs, [BLOCK, 2]))
    else:
        g = tl.load(gate + row * gate_stride + cols, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + row * up_stride + cols, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "clamped":
        over_g = g > limit
        over_u = (u > limit) | (u < -limit)
        g = tl.where(over_g, limit, g)
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u)) + 1.0
    act, slope = _activated(g, ACTIVATION, alpha)
    dg = d * u * slope
    du = d * act
    if ACTIVATION == "clamped":
        dg = tl.where(over_g, 0.0, dg)
        du = tl.where(over_u, 0.0, du)
    DTYPE: tl.constexpr = grad_gate.dtype.element_ty
    if PACKED:
        found = _as(tl.reshape(tl.join(dg, du), [2 * BLOCK]), DTYPE)
        tl.store(grad_gate + row * out_stride + both, found, mask=both < 2 * columns)
    else:
        tl.store(grad_gate + row * out_stride + cols, _as(dg, DTYPE), mask=inside)
        tl.store(grad_up + row * out_stride + cols, _as(du, DTYPE), mask=inside)


class Pair(NamedTuple):
    """Gate and up as rows of `columns`, with strides; `up` is None where they are interleaved in `gate`."""

    gate: Tensor
    up: Tensor | None
    rows: int
    columns: int
    gate_stride: int
    up_stride: int


def pair_of(gate: Tensor, up: Tensor | None, layout: str) -> Pair:
    """The geometry of two tensors, or of one that holds both (`halves` or `interleaved`)."""
    if up is None:
        packed, stride = _rows(gate)
        columns = gate.shape[-1] // 2
        rows = gate.numel() // gate.shape[-1]
        if layout == "interleaved":
            return Pair(packed, None, rows, columns, stride, 0)
        halves = packed.as_strided((rows, 2, columns), (stride, columns, 1))
        return Pair(halves[:, 0], halves[:, 1], rows, columns, stride, stride)
    columns, numbers = gate.shape[-1], gate.numel()
    if gate.is_contiguous() and up.is_contiguous():
        return Pair(gate, up, 1, numbers, numbers, numbers)
    (gate, gate_stride), (up, up_stride) = _rows(gate), _rows(up)
    return Pair(gate, up, numbers // columns, columns, gate_stride, up_stride)


def _rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The tensor with adjacent columns and rows of one stride (a copy where it is not so), and that stride."""
    rows = rows_of(tensor)
    if rows is None or rows.inner != rows.count or (rows.column_stride != 1 and tensor.shape[-1] > 1):
        return tensor.contiguous(), tensor.shape[-1]
    return tensor, rows.inner_stride


def forward(
    gate: Tensor,
    up: Tensor | None,
    layout: str,
    activation: str,
    alpha: float,
    limit: float,
    launch: Launch | None = None,
) -> Tensor:
    """The result, adjacent."""
    columns = gate.shape[-1] if up is not None else gate.shape[-1] // 2
    y = torch.empty((*gate.shape[:-1], columns), dtype=gate.dtype, device=gate.device)
    if not y.numel():
        return y
    pair = pair_of(gate, up, layout)
    launch = launch or default_launch(pair.columns)
    with on_device_of(gate):
        forward_kernel[(pair.rows * quotient(pair.columns, launch.block),)](
            pair.gate,
            pair.up if pair.up is not None else pair.gate,
            y,
            pair.columns,
            pair.gate_stride,
            pair.up_stride,
            alpha,
            limit,
            ACTIVATION=activation,
            PACKED=pair.up is None,
            BLOCK=launch.block,
            num_warps=launch.warps,
            enable_fp_fusion=True,
        )
    return y


def backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    layout: str,
    activation: str,
    alpha: float,
    limit: float,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, or of the tensor that holds both and a tensor without elements."""
    grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grad_up = torch.empty(0 if up is None else up.shape, dtype=gate.dtype, device=gate.device)
    if not grad.numel():
        return grad_gate, grad_up
    pair = pair_of(gate, up, layout)
    grad, grad_stride = (grad.contiguous(), pair.columns) if pair.rows == 1 else _rows(grad)
    # Where both gradients go into one tensor, its second half is where that of `up` begins.
    sink = grad_gate.view(-1)[pair.columns :] if up is None and pair.up is not None else grad_up
    launch = launch or default_launch(pair.columns, backward=True)
    with on_device_of(gate):
        backward_kernel[(pair.rows * quotient(pair.columns, launch.block),)](
            grad,
            pair.gate,
            pair.up if pair.up is not None else pair.gate,
            grad_gate,
            sink if pair.up is not None else grad_gate,
            pair.columns,
            grad_stride,
            pair.gate_stride,
            pair.up_stride,
            pair.columns if up is not None else 2 * pair.columns,
            alpha,
            limit,
            ACTIVATION=activation,
            PACKED=pair.up is None,
            BLOCK=launch.block,
            num_warps=launch.warps,
            enable_fp_fusion=True,
        )
    return grad_gate, grad_up
