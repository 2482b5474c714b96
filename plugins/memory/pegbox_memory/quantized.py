"""What quantization makes of frozen weights, by its rule: a model without weights is built unquantized.

bitsandbytes replaces linear layers but the named ones. 4 bits: half a byte, and a scale for each block of 64 (float32,
or with double quantization one byte and a float32 for each 256 blocks; Dettmers et al., arXiv:2305.14314). 8 bits: one
byte, and a float32 for each row (arXiv:2208.07339). A product unpacks one matrix at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

BLOCK, BLOCKS_OF_SCALES = 64, 256


@dataclass(frozen=True)
class StoredBytes:
    """Of the weights that are quantized: bytes as built, as they are kept, and of the largest one unpacked."""

    built: int = 0
    kept: int = 0
    unpacked: int = 0


def stored_bytes(module: nn.Module, quantization: Any) -> StoredBytes:
    """The rule applied to a network that was built without it."""
    if quantization is None:
        return StoredBytes()
    skipped = tuple(getattr(quantization, "llm_int8_skip_modules", None) or ())
    four = bool(getattr(quantization, "load_in_4bit", False))
    if not four and not getattr(quantization, "load_in_8bit", False):
        return StoredBytes()
    double = bool(getattr(quantization, "bnb_4bit_use_double_quant", False))
    scale = (1 + 4 / BLOCKS_OF_SCALES) / BLOCK if double else 4 / BLOCK
    built = kept = unpacked = 0
    for name, part in module.named_modules():
        parts = name.split(".")
        if not isinstance(part, nn.Linear) or part.weight.requires_grad or set(parts) & set(skipped):
            continue
        if any(piece.startswith("lora_") for piece in parts):
            continue
        numbers, rows = part.weight.numel(), part.weight.shape[0]
        size = numbers * part.weight.element_size()
        built += size
        kept += round(numbers * (0.5 + scale)) if four else numbers + 4 * rows
        unpacked = max(unpacked, size)
    return StoredBytes(built, kept, unpacked)
