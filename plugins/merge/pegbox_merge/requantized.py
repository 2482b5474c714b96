"""Weights as a quantized run saw them: quantized by bitsandbytes with the run's settings, and dequantized again.

An adapter that was trained on a quantized base also makes up for the errors of quantization; added to the published
weights it would correct errors that are not there (Dettmers et al. 2023, arXiv:2305.14314, section 3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

QUANTIZED = ("Linear4bit", "Linear8bitLt")


def quantized_weights(module: nn.Module, config: BitsAndBytesConfig) -> frozenset[str]:
    """Names of the weights that transformers quantizes while it loads the model. `module`, on meta, is changed."""
    from transformers.quantizers import AutoHfQuantizer

    quantizer: Any = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model=module, device_map={"": "cpu"})
    return frozenset(f"{name}.weight" for name, part in module.named_modules() if type(part).__name__ in QUANTIZED)


def as_trained(weight: Tensor, config: BitsAndBytesConfig) -> Tensor:
    """The values that training computed with; same shape and data type."""
    from bitsandbytes import functional

    if not config.load_in_4bit:
        packed, scale, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return (packed.float() * scale.float()[:, None] / 127).to(weight.dtype)
    packed, state = functional.quantize_4bit(
        weight.contiguous(),
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
    )
    return functional.dequantize_4bit(packed, state).to(weight.dtype)
