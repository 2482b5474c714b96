"""Unpacks MXFP4 at the speed of memory: four bits read, sixteen written, for each number.

The three bits below the sign are put where an fp32 has its lowest exponent bits and highest mantissa bit. That is
the number itself times 2^-126, subnormal 0.5 included, so that a multiplication by 2^127 and one by half the scale
decode it exactly, without a table and without a branch; half, because the largest scale, 2^128, is no fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pegbox_kernels.dispatch import on_device_of

LIFT = tl.constexpr(2.0**127)


class Launch(NamedTuple):
    """Blocks of 32 numbers that one program unpacks, and its warps."""

    blocks: int = 128
    warps: int = 4


@triton.jit
def _decoded(bits, half):
    """Numbers in fp32 of their four bits, which lie at bits 28 to 31 of an int32, the sign first."""
    placed = (bits & -0x80000000) | ((bits >> 6) & 0x01C00000)
    return placed.to(tl.float32, bitcast=True) * LIFT * half


@triton.jit
def dequantize_kernel(blocks, scales, out, count, BLOCKS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    inside = block < count
    s = tl.load(scales + block, mask=inside, other=0).to(tl.int32)
    # Half of 2^(s - 127): s - 1 is its exponent field, but for the lowest two, which are subnormal.
    half = tl.where(s < 2, 0x00200000 << s, (s - 1) << 23).to(tl.float32, bitcast=True)[:, None]
    i = tl.arange(0, 16)
    byte = tl.load(blocks + block[:, None] * 16 + i[None, :], mask=inside[:, None], other=0).to(tl.int32)
    pair = tl.join(_decoded(byte << 28, half), _decoded((byte >> 4) << 28, half))
    values = tl.reshape(pair, [BLOCKS, 32])
    place = out + block[:, None] * 32 + tl.arange(0, 32)[None, :]
    if out.dtype.element_ty == tl.bfloat16:
        # Exact, so that the upper half of the bits is the number: nothing is rounded, subnormals stay.
        values = (values.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    tl.store(place, values.to(out.dtype.element_ty), mask=inside[:, None])


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype, launch: Launch | None = None) -> Tensor:
    """blocks (..., G, 16), scales (..., G) -> (..., 32 G), contiguous."""
    launch = launch or Launch()
    out = torch.empty((*blocks.shape[:-2], blocks.shape[-2] * 32), dtype=dtype, device=blocks.device)
    count = scales.numel()
    if count:
        with on_device_of(blocks):
            dequantize_kernel[(triton.cdiv(count, launch.blocks),)](
                blocks.contiguous(),
                scales.contiguous(),
                out,
                count,
                BLOCKS=launch.blocks,
                num_warps=launch.warps,
            )
    return out
