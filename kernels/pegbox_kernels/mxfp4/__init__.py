"""Expert weights kept as MXFP4 (4.25 bits a number) and unpacked when they are needed.

    packed = PackedMxfp4(blocks, scales)          # as a gpt-oss checkpoint holds them
    weight = packed.dequantize(torch.bfloat16)    # (E, out, in): exact, every E2M1 times a power of two is a bf16

Frozen by definition: nothing here has a gradient. GPU tensors (and CPU tensors under Triton's interpreter) take the
kernel of `triton.py`, others `reference.py`.

Shapes: E experts, `out` and `in` of a linear layer, G = in / 32 blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pegbox_kernels.dispatch import runs_kernels
from pegbox_kernels.mxfp4 import reference

__all__ = ["PackedMxfp4", "dequantize"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BYTES = 16


@dataclass(frozen=True)
class PackedMxfp4:
    """A tensor (..., in) in MXFP4; for experts (E, out, in).

    Attributes:
        blocks: (..., G, 16) uint8, two numbers a byte, the first in its low half.
        scales: (..., G) uint8, the exponent of 2 plus 127.
    """

    blocks: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        _check(self.blocks, self.scales)

    @classmethod
    def quantize(cls, values: Tensor) -> PackedMxfp4:
        """Pack finite numbers, rounding to nearest; the last dimension is a multiple of 32.

        Raises:
            ValueError: it is not.
        """
        if values.ndim == 0 or values.shape[-1] % reference.BLOCK:
            raise ValueError(
                f"values {tuple(values.shape)}: MXFP4 packs 32 numbers of a row together; pad the last dimension."
            )
        return cls(*reference.quantize(values.detach()))

    @property
    def shape(self) -> torch.Size:
        """Of the tensor that is packed."""
        return torch.Size((*self.scales.shape[:-1], self.scales.shape[-1] * reference.BLOCK))

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    @property
    def packed_bytes(self) -> int:
        return self.blocks.numel() + self.scales.numel()

    def to(self, device: torch.device | str) -> PackedMxfp4:
        return PackedMxfp4(self.blocks.to(device), self.scales.to(device))

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The tensor, contiguous, in `dtype`."""
        return dequantize(self.blocks, self.scales, dtype)


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """blocks (..., G, 16) uint8 and scales (..., G) uint8 -> (..., 32 G); exact in bf16 and fp32.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check(blocks, scales)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}: MXFP4 unpacks to bfloat16, float16 or float32.")
    return _dequantize(blocks, scales, dtype)


def _check(blocks: Tensor, scales: Tensor) -> None:
    shapes = f"blocks {tuple(blocks.shape)} {blocks.dtype} and scales {tuple(scales.shape)} {scales.dtype}"
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"{shapes}: both must be uint8; view float8_e8m0fnu scales as uint8.")
    if blocks.ndim < 2 or blocks.shape[-1] != BYTES or blocks.shape[:-1] != scales.shape:
        raise ValueError(f"{shapes} do not fit: blocks are (..., G, 16) and scales (..., G).")
    if blocks.device != scales.device:
        raise ValueError(f"blocks lie on {blocks.device} and scales on {scales.device}. Move one of them.")


@torch.library.custom_op(
    "pegbox_kernels::mxfp4_dequantize",
    mutates_args=(),
    schema="(Tensor blocks, Tensor scales, ScalarType dtype) -> Tensor",
)
def _dequantize(blocks, scales, dtype):  # type: ignore[no-untyped-def]
    if runs_kernels(blocks):
        from pegbox_kernels.mxfp4 import triton as kernels

        return kernels.dequantize(blocks, scales, dtype)
    return reference.dequantize(blocks, scales, dtype)


@_dequantize.register_fake
def _(blocks, scales, dtype):  # type: ignore[no-untyped-def]
    return blocks.new_empty((*blocks.shape[:-2], blocks.shape[-2] * reference.BLOCK), dtype=dtype)
