"""MXFP4 in plain PyTorch: what the packed bytes mean, and how a tensor is packed.

OCP Microscaling Formats (MX) v1.0, section 5: 32 numbers share one scale 2^(s - 127), s a byte (E8M0); each is four
bits, sign, two bits of exponent, one of mantissa (E2M1), and stands for one of

    0  0.5  1  1.5  2  3  4  6        and their negatives

Packing takes the shared exponent floor(log2 of the largest magnitude) - 2 (6.3 of the same document, 2 being the
largest exponent of E2M1), and rounds to nearest, ties to even mantissa, at most 6.

Shapes: `...` leading dimensions, N numbers in a row, G = N / 32 blocks. Byte i of a block holds its numbers 2 i (low
half) and 2 i + 1 (high half), as gpt-oss checkpoints do.
"""

from __future__ import annotations

import torch
from torch import Tensor

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BLOCK = 32
BIAS = 127
LARGEST_EXPONENT = 2


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """blocks (..., G, 16) uint8, scales (..., G) uint8 -> (..., 32 G) in `dtype`."""
    table = torch.tensor((*VALUES, *(-value for value in VALUES)), dtype=torch.float32, device=blocks.device)
    halves = torch.stack((blocks & 0xF, blocks >> 4), dim=-1).flatten(-2)
    scale = torch.exp2(scales.to(torch.float64) - BIAS).unsqueeze(-1)  # The largest scale, 2^128, is no fp32.
    return (table[halves.long()] * scale).float().to(dtype).flatten(-2)


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """(..., N) of finite numbers, N a multiple of 32 -> blocks (..., G, 16), scales (..., G), both uint8."""
    grouped = values.float().unflatten(-1, (-1, BLOCK))
    largest = grouped.abs().amax(-1)
    exponent = torch.frexp(largest).exponent - 1 - LARGEST_EXPONENT
    scales = torch.where(largest > 0, (exponent + BIAS).clamp(0, 254), BIAS)
    scaled = torch.ldexp(grouped, (BIAS - scales).unsqueeze(-1))
    magnitude = scaled.abs()
    # Between 2^e and 2^(e+1) neighbours are 2^(e-1) apart, below 1 they are 0.5 apart; round() is to even, and an
    # even multiple of the distance is an even mantissa.
    distance = torch.ldexp(torch.ones_like(magnitude), torch.frexp(magnitude.clamp(min=1.0)).exponent - 2)
    rounded = (torch.round(magnitude / distance) * distance).clamp(max=VALUES[-1])
    code = torch.searchsorted(torch.tensor(VALUES, device=values.device), rounded.contiguous()).to(torch.uint8)
    code = code | (torch.signbit(scaled).to(torch.uint8) << 3)
    return (code[..., 0::2] | (code[..., 1::2] << 4)).contiguous(), scales.to(torch.uint8)
