"""transformers loads the experts packed: a quantizer at its seam for them, under a name of its own.

Its own quantizer for MXFP4 either unpacks to bfloat16 or needs kernels that have no backward. This one keeps the blocks
and scales of a checkpoint as they are, or packs experts as they are read, one weight at a time; everything else of the
loading, shards and devices included, stays transformers'.
"""

from __future__ import annotations

from typing import Any

from pegbox.errors import ConfigError
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from pegbox_mxfp4.experts import PARTS, is_experts
from pegbox_mxfp4.weight import PACKED_BYTES_PER_NUMBER, PackedWeight

METHOD = "pegbox_mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"
"""What the names of stored packed experts end in (the layout of gpt-oss)."""


@register_quantization_config(METHOD)
class PackedExpertsConfig(QuantizationConfigMixin):
    """Experts are kept in MXFP4; `quantize`: they are stored in floating point, and packed as they are read."""

    def __init__(self, quantize: bool = False, **_: object) -> None:
        self.quant_method = METHOD
        self.quantize = quantize


@register_quantizer(METHOD)
class PackedExpertsQuantizer(HfQuantizer):
    """Loads stacked experts as packed weights."""

    requires_calibration = False
    is_trainable = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = not quantization_config.quantize

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        return _is_expert_weight(model, param_name)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        packed = _is_expert_weight(model, param_name)
        return PACKED_BYTES_PER_NUMBER if packed else float(super().param_element_size(model, param_name, param))

    def get_quantize_ops(self) -> ConversionOps:
        return Pack()

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.pre_quantized:
            return []
        return [WeightConverter([f"{part}{BLOCKS}", f"{part}{SCALES}"], rf"{part}$", [Keep(part)]) for part in PARTS]

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
        stored = any(_holds_packed(file) for file in checkpoint_files or ())
        if stored and not self.pre_quantized:
            raise ConfigError(
                "mxfp4.quantize is true, but the checkpoint holds its experts in MXFP4 already",
                "Numbers are packed once, from their full values.",
                "Remove mxfp4.quantize.",
            )
        if not stored and self.pre_quantized:
            raise ConfigError(
                "mxfp4 is in plugins, but the checkpoint holds no weight in MXFP4",
                f"Packed experts are stored under names that end in {BLOCKS} and {SCALES}.",
                "To pack its experts while they are loaded, add to the config: mxfp4: {quantize: true}",
            )


class Keep(ConversionOps):
    """Blocks (E, out, G, 16) and scales (E, out, G) of a checkpoint as one packed weight."""

    def __init__(self, part: str) -> None:
        self.part = part

    def convert(self, input_dict: dict[str, Any], model: Any, full_layer_name: str, **_: Any) -> dict[str, Any]:
        blocks, scales = (_one(input_dict[f"{self.part}{end}"]) for end in (BLOCKS, SCALES))
        module, _name = get_module_from_name(model, full_layer_name)
        dtype = getattr(module, self.part).dtype
        return {full_layer_name: frozen(PackedWeight(blocks, scales, module.is_transposed, dtype))}


class Pack(ConversionOps):
    """A weight in floating point as a packed one."""

    def convert(self, input_dict: dict[str, Any], model: Any, full_layer_name: str, **_: Any) -> dict[str, Any]:
        (values,) = input_dict.values()
        module, _name = get_module_from_name(model, full_layer_name)
        return {full_layer_name: frozen(PackedWeight.quantize(_one(values), module.is_transposed))}


def frozen(weight: PackedWeight) -> nn.Parameter:
    """The weight as a parameter that is not trained."""
    return nn.Parameter(weight, requires_grad=False)


def _one(values: Tensor | list[Tensor]) -> Tensor:
    return values[0] if isinstance(values, list) else values


def _is_expert_weight(model: Any, name: str) -> bool:
    path, _, part = name.rpartition(".")
    return part in PARTS and is_experts(model.get_submodule(path))


def _holds_packed(file: str) -> bool:
    with safe_open(file, framework="pt") as weights:
        names: list[str] = list(weights.keys())
    return any(name.endswith(f"{part}{BLOCKS}") for name in names for part in PARTS)
