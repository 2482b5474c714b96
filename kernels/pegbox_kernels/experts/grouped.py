"""The products of sorted rows with the weights of their experts, by one of two providers.

`grouped_mm` is torch's (CUTLASS on Hopper): fast at bf16 there; it wants its rows gathered, and knows nothing of LoRA.
`triton` is ours: it gathers rows as it loads them, adds the rank product to the sum, as one more step of its inner
loop, and takes bias and activation from a sum that is not kept. It serves every GPU that Triton serves, fp32 and fp16.

A tile of ours is ROWS rows of one expert by COLUMNS; programs walk over the tiles, GROUP blocks of rows beside each
other before the next columns, so that the weights of an expert are read from memory once and then from L2.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from pegbox_kernels.dispatch import on_device_of
from pegbox_kernels.experts.routing import Routing
from pegbox_kernels.experts.tiles import (
    INTERPRETED,
    blocks_at_most,
    bounds,
    gated,
    locate,
    padded_experts,
    padded_rank,
    precision,
    product,
    rounded,
    total_blocks,
)

Base = Literal["grouped_mm", "triton"]


class Gate(NamedTuple):
    """Which activation, and where its two inputs lie."""

    activation: str
    interleaved: bool
    alpha: float
    limit: float


class Launch(NamedTuple):
    """A tile of rows by columns with `depth` summed at once; row blocks beside each other; programs per multiprocessor
    (0: one for each tile)."""

    rows: int
    columns: int
    depth: int
    group: int
    warps: int
    stages: int
    resident: int = 0


LAUNCHES = {
    "sm_80": Launch(128, 128, 64, 8, warps=8, stages=3),
    "sm_86": Launch(128, 128, 32, 8, warps=8, stages=3),
    "sm_90": Launch(128, 256, 64, 8, warps=8, stages=4),
    "hip": Launch(128, 128, 64, 8, warps=8, stages=2),
    "interpreter": Launch(32, 64, 32, 2, warps=4, stages=1, resident=1),
}
"""By architecture, for bf16 and many rows an expert; `launch_for` fits them to the case."""


def launch_for(x: Tensor, rows: int, experts: int) -> Launch:
    """The default for this device, with fewer rows where experts have few, and half the depth for fp32."""
    if INTERPRETED.value:
        return LAUNCHES["interpreter"]
    target = driver.active.get_current_target()
    if target.backend == "cuda":
        launch = LAUNCHES["sm_90" if target.arch >= 90 else "sm_80" if target.arch == 80 else "sm_86"]
        if target.arch >= 100:
            launch = launch._replace(columns=128)
    else:
        launch = LAUNCHES["hip"]
    if rows <= 64 * experts:
        launch = launch._replace(rows=64, columns=min(launch.columns, 128), warps=4)
    if x.dtype == torch.float32:
        launch = launch._replace(depth=launch.depth // 2, columns=min(launch.columns, 128))
    return launch


def programs(x: Tensor, tiles: int, launch: Launch) -> int:
    """How many to launch for at most this many tiles."""
    if not launch.resident:
        return tiles
    count = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3
    return min(tiles, count * launch.resident)


@triton.jit
def _columns(first, size, HALVES: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of a tile; HALVES: COLUMNS / 2 of the first half of a row, then those beside them in the second."""
    j = tl.arange(0, COLUMNS)
    if HALVES:
        HALF: tl.constexpr = COLUMNS // 2
        return first // 2 + j % HALF + j // HALF * (size // 2), first // 2 + j % HALF < size // 2
    return first + j, first + j < size


@triton.jit
def _store_gated(
    acc,
    bias,
    h,
    row,
    first,
    size,
    inside,
    alpha,
    limit,
    BIAS: tl.constexpr,
    GPT_OSS: tl.constexpr,
    HALVES: tl.constexpr,
):
    """h of a tile of z, which it needs no second time."""
    HALF: tl.constexpr = acc.shape[1] // 2
    if HALVES:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [acc.shape[0], 2, HALF]), (0, 2, 1)))
    else:
        gate, up = tl.split(tl.reshape(acc, [acc.shape[0], HALF, 2]))
    inner = size // 2
    column = first // 2 + tl.arange(0, HALF)
    mask = column < inner
    if BIAS:
        gate += tl.load(bias + (column if HALVES else 2 * column), mask=mask, other=0.0).to(tl.float32)[None, :]
        at_up = bias + (inner + column if HALVES else 2 * column + 1)
        up += tl.load(at_up, mask=mask, other=0.0).to(tl.float32)[None, :]
    out = rounded(gated(gate, up, alpha, limit, GPT_OSS), h.dtype.element_ty)
    tl.store(h + (row[:, None] * inner + column[None, :]), out, mask=inside[:, None] & mask[None, :])


@triton.jit
def product_kernel(
    x,
    order,
    weight,
    projected,
    factor,
    offsets,
    y,
    bias,
    h,
    experts,
    size,
    depth,
    rank,
    top_k,
    x_stride,
    weight_expert,
    weight_depth,
    weight_column,
    factor_expert,
    factor_column,
    factor_rank,
    alpha,
    limit,
    GATHER: tl.constexpr,
    LORA: tl.constexpr,
    GATED: tl.constexpr,
    GPT_OSS: tl.constexpr,
    HALVES: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y is the product; GATED: h is its activation, with the bias, instead. HALVES: gate and up do not alternate."""
    row_blocks = total_blocks(offsets, experts, ROWS, EXPERTS)
    column_blocks = tl.cdiv(size, COLUMNS)
    k = tl.arange(0, DEPTH)
    r = tl.arange(0, RANK)
    for tile in range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0)):
        top = tile // (GROUP * column_blocks) * GROUP
        beside = tl.minimum(row_blocks - top, GROUP)
        within = tile % (GROUP * column_blocks)
        expert, first, end = locate(offsets, top + within % beside, experts, ROWS, EXPERTS)
        expert = expert.to(tl.int64)
        column, mask = _columns(within // beside * COLUMNS, size, HALVES, COLUMNS)
        row = first + tl.arange(0, ROWS)
        inside = row < end
        # Rows past the end read its last one, which needs no mask, and are not written.
        row = tl.minimum(row, end - 1)
        source = tl.load(order + row) // top_k if GATHER else row
        left = x + source.to(tl.int64)[:, None] * x_stride + k[None, :]
        right = weight + expert * weight_expert
        right += k.to(tl.int64)[:, None] * weight_depth + column.to(tl.int64)[None, :] * weight_column
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for begin in range(0, depth, DEPTH):
            if EVEN:
                a = tl.load(left)
                b = tl.load(right, mask=mask[None, :], other=0.0)
            else:
                a = tl.load(left, mask=(begin + k < depth)[None, :], other=0.0)
                b = tl.load(right, mask=(begin + k < depth)[:, None] & mask[None, :], other=0.0)
            acc = product(a, b, acc, PRECISION)
            left += DEPTH
            right += DEPTH * weight_depth
        # Made again rather than kept in registers while the sum takes them.
        column, mask = _columns(within // beside * COLUMNS, size, HALVES, COLUMNS)
        row = tl.arange(0, ROWS)
        inside = row < end - first
        above = first.to(tl.int64)
        if LORA:
            at = projected + above * rank + (tl.minimum(row, end - first - 1)[:, None] * rank + r[None, :])
            p = tl.load(at, mask=(r < rank)[None, :], other=0.0)
            at_factor = factor + expert * factor_expert + column[None, :] * factor_column + r[:, None] * factor_rank
            f = tl.load(at_factor, mask=mask[None, :] & (r < rank)[:, None], other=0.0)
            acc = product(p, f, acc, PRECISION)
        if not GATED:
            place = y + above * size + (row[:, None] * size + column[None, :])
            tl.store(place, rounded(acc, y.dtype.element_ty), mask=inside[:, None] & mask[None, :])
        else:
            at_bias = bias + expert * size if BIAS else bias
            start = within // beside * COLUMNS
            at_h = h + above * (size // 2)
            _store_gated(acc, at_bias, at_h, row, start, size, inside, alpha, limit, BIAS, GPT_OSS, HALVES)


def multiply(
    x: Tensor,
    weight: Tensor,
    routing: Routing,
    *,
    top_k: int | None = None,
    lora: tuple[Tensor, Tensor] | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """By our kernel: rows of x times weight (E, C, D), plus a rank product.

    Args:
        x: (T, C) if `top_k` (rows are gathered), else (N, C) sorted.
        weight: (E, C, D), any strides.
        lora: projection (N, R) of the rows, and factor (E, D, R), any strides.

    Returns:
        (N, D).
    """
    y = x.new_empty((routing.order_N.numel(), weight.shape[2]))
    _launch(x, weight, routing, top_k, lora, y, None, None, None, launch)
    return y


def multiply_gated(
    x: Tensor,
    weight: Tensor,
    routing: Routing,
    gate: Gate,
    *,
    top_k: int | None,
    lora: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    launch: Launch | None = None,
) -> Tensor:
    """`multiply`, then the activation of its sum and the bias (E, J): h (N, I), without writing the product."""
    h = x.new_empty((routing.order_N.numel(), weight.shape[2] // 2))
    _launch(x, weight, routing, top_k, lora, None, bias, h, gate, launch)
    return h


def _launch(
    x: Tensor,
    weight: Tensor,
    routing: Routing,
    top_k: int | None,
    lora: tuple[Tensor, Tensor] | None,
    y: Tensor | None,
    bias: Tensor | None,
    h: Tensor | None,
    gate: Gate | None,
    launch: Launch | None,
) -> None:
    rows, experts, size = routing.order_N.numel(), routing.offsets_E.numel(), weight.shape[2]
    launch = launch or launch_for(x, rows, experts)
    tiles = blocks_at_most(rows, experts, launch.rows) * triton.cdiv(size, launch.columns)
    projected, factor = lora or (None, None)
    rank = 1 if factor is None else factor.shape[2]
    if not tiles:
        return
    with on_device_of(x):
        product_kernel[(programs(x, tiles, launch),)](
            x,
            routing.order_N,
            weight,
            projected,
            factor,
            routing.offsets_E,
            y,
            bias,
            h,
            experts,
            size,
            x.shape[1],
            rank,
            top_k or 1,
            x.stride(0),
            *weight.stride(),
            *((0, 0, 0) if factor is None else factor.stride()),
            1.0 if gate is None else gate.alpha,
            1.0 if gate is None else gate.limit,
            GATHER=top_k is not None,
            LORA=lora is not None,
            GATED=gate is not None,
            GPT_OSS=gate is not None and gate.activation == "gpt_oss",
            HALVES=gate is not None and not gate.interleaved,
            BIAS=bias is not None,
            EVEN=x.shape[1] % launch.depth == 0,
            PRECISION=precision(x),
            EXPERTS=padded_experts(experts),
            RANK=padded_rank(rank),
            ROWS=launch.rows,
            COLUMNS=launch.columns,
            DEPTH=launch.depth,
            GROUP=launch.group,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )


@triton.jit
def weight_gradient_kernel(
    x,
    y,
    order,
    offsets,
    out,
    depth,
    size,
    top_k,
    x_stride,
    y_stride,
    out_expert,
    out_depth,
    out_column,
    GATHER_X: tl.constexpr,
    GATHER_Y: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out[expert] (depth, size) = x^T y over the rows of an expert, of which DEPTH are summed at once."""
    expert = tl.program_id(1).to(tl.int64)
    begin, end = bounds(offsets, expert)
    blocks = tl.cdiv(depth, ROWS)
    i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(0) // blocks * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(begin, end, DEPTH):
        row = first + tl.arange(0, DEPTH)
        inside = row < end
        token = tl.load(order + row, mask=inside, other=0) // top_k if GATHER_X or GATHER_Y else row
        x_row = (token if GATHER_X else row).to(tl.int64) * x_stride
        y_row = (token if GATHER_Y else row).to(tl.int64) * y_stride
        a = tl.load(x + x_row[:, None] + i[None, :], mask=inside[:, None] & (i < depth)[None, :], other=0.0)
        b = tl.load(y + y_row[:, None] + j[None, :], mask=inside[:, None] & (j < size)[None, :], other=0.0)
        acc = product(tl.trans(a), b, acc, PRECISION)
    place = out + expert * out_expert + i.to(tl.int64)[:, None] * out_depth + j.to(tl.int64)[None, :] * out_column
    tl.store(place, rounded(acc, out.dtype.element_ty), mask=(i < depth)[:, None] & (j < size)[None, :])


def weight_gradient(
    x: Tensor,
    y: Tensor,
    routing: Routing,
    out: Tensor,
    *,
    gather_x: int | None = None,
    gather_y: int | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """By our kernel: out (E, C, D), any strides, becomes x^T y of each expert; zero for one without rows.

    x (N, C) and y (N, D) are sorted rows, or (T, ...) to be gathered, with `top_k` in `gather_x` or `gather_y`.
    """
    experts = routing.offsets_E.numel()
    launch = launch or launch_for(x, routing.order_N.numel(), experts)._replace(
        rows=128 if not INTERPRETED.value else 32
    )
    tiles = triton.cdiv(out.shape[1], launch.rows) * triton.cdiv(out.shape[2], launch.columns)
    with on_device_of(x):
        weight_gradient_kernel[(tiles, experts)](
            x,
            y,
            routing.order_N,
            routing.offsets_E,
            out,
            out.shape[1],
            out.shape[2],
            gather_x or gather_y or 1,
            x.stride(0),
            y.stride(0),
            *out.stride(),
            GATHER_X=gather_x is not None,
            GATHER_Y=gather_y is not None,
            PRECISION=precision(x),
            ROWS=launch.rows,
            COLUMNS=launch.columns,
            DEPTH=launch.depth,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
    return out


@triton.jit
def zero_empty_kernel(out, offsets, count, BLOCK: tl.constexpr):
    expert = tl.program_id(1).to(tl.int64)
    begin, end = bounds(offsets, expert)
    if begin == end:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + expert * count + i, tl.zeros([BLOCK], out.dtype.element_ty), mask=i < count)


def zero_empty(out: Tensor, routing: Routing) -> Tensor:
    """Zero the part of each expert without rows in out (E, ...), contiguous; others are not touched."""
    count = out[0].numel()
    with on_device_of(out):
        zero_empty_kernel[(triton.cdiv(count, 8192), out.shape[0])](out, routing.offsets_E, count, BLOCK=8192)
    return out


def grouped_mm(x: Tensor, weight: Tensor, routing: Routing) -> Tensor:
    """By torch: sorted rows (N, C) times weight (E, C, D)."""
    if x.shape[0] == 0:
        return x.new_empty((0, weight.shape[2]))
    return torch.nn.functional.grouped_mm(x, weight, offs=routing.offsets_E)


def grouped_mm_weight_gradient(x: Tensor, y: Tensor, routing: Routing) -> Tensor:
    """By torch: (E, C, D), x^T y of each expert's sorted rows. What it leaves of an empty expert is overwritten."""
    if x.shape[0] == 0:
        return x.new_zeros((routing.offsets_E.numel(), x.shape[1], y.shape[1]))
    found = torch.nn.functional.grouped_mm(x.t(), y, offs=routing.offsets_E)
    return zero_empty(found.contiguous(), routing)


def why_not_grouped_mm(x: Tensor, weights: tuple[Tensor, ...]) -> str | None:
    """Why torch's product cannot serve these (E, C, D) weights without waiting for the device; None if it can."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
    if x.is_cuda and x.dtype != torch.bfloat16:
        return f"torch's grouped_mm takes bfloat16 on a GPU, not {x.dtype}"
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] < 9:
        return "torch's grouped_mm is a loop that waits for the device below compute capability 9.0"
    unit = 16 // x.element_size()
    for weight in weights:
        _, depth, size = weight.shape
        _, by_depth, by_column = weight.stride()
        rows_first = by_column == 1 and by_depth % unit == 0 and by_depth >= size
        columns_first = by_depth == 1 and by_column % unit == 0 and by_column >= depth
        if not (rows_first or columns_first) or depth % unit or size % unit:
            return (
                f"torch's grouped_mm needs sizes that are multiples of {unit} and one stride of 1: a weight is "
                f"{tuple(weight.shape)} with strides {weight.stride()}"
            )
        if weight.device.type != "meta" and weight.data_ptr() % 16:
            return "torch's grouped_mm needs weights that begin on 16 bytes"
    return None
