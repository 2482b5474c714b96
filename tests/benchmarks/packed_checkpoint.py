"""Checkpoints of gpt-oss with random numbers, experts in MXFP4 as they are published, written a layer at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from step_watch import device

EXPERTS = ("gate_up_proj", "down_proj")
BLOCK, SCALES = 32, (118, 122)  # Powers of two, less 127: numbers are as small as those of a trained model.


def write_packed(settings: Mapping[str, Any], folder: Path) -> None:
    """Write config and weights: a file for each layer, and one for what belongs to none.

    Args:
        settings: of transformers' `GptOssConfig`.
    """
    from transformers import AutoModelForCausalLM, GptOssConfig

    config = GptOssConfig(**settings, dtype="bfloat16", architectures=["GptOssForCausalLM"])
    config.quantization_config = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    config.save_pretrained(folder)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in module.named_parameters():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        parts.setdefault(layer, {})[name] = weight
    places = {}
    for layer, weights in parts.items():
        file = f"model-{layer}.safetensors"
        tensors = {name: values for of, weight in weights.items() for name, values in _random(of, weight).items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _random(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is stored for one parameter: experts (E, in, out) as blocks (E, out, in / 32, 16) and scales."""
    if name.endswith(EXPERTS):
        count, inner, outer = weight.shape
        blocks = torch.randint(0, 256, (count, outer, inner // BLOCK, 16), dtype=torch.uint8, device=device())
        scales = torch.randint(*SCALES, (count, outer, inner // BLOCK), dtype=torch.uint8, device=device())
        return {f"{name}_blocks": blocks.cpu(), f"{name}_scales": scales.cpu()}
    if weight.ndim == 1:
        value = 1.0 if "norm" in name else 0.0
        return {name: torch.full(weight.shape, value, dtype=weight.dtype)}
    values = torch.randn(weight.shape, dtype=weight.dtype, device=device()) / math.sqrt(weight.shape[-1])
    return {name: values.cpu()}
