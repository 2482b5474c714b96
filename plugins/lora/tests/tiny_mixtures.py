"""Tiny mixtures of experts, whose weights are stacked parameters."""

from __future__ import annotations

import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SIZES = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def mixture(kind: str) -> PreTrainedModel:
    """A tiny mixture of experts whose weights are stacked; gpt-oss stacks them transposed and with biases."""
    torch.manual_seed(0)
    if kind == "gpt-oss":
        return GptOssForCausalLM(GptOssConfig(num_local_experts=4, num_experts_per_tok=2, **SIZES, **HEADS))
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SIZES, **HEADS))
    config = Qwen3MoeConfig(num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2, **SIZES, **HEADS)
    return Qwen3MoeForCausalLM(config)
