"""The models, adapters and rows of which `gpu_step.py` measures a training step, with the sections of our plugins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from step_watch import device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass(frozen=True)
class Case:
    """One model, its adapters, and the rows of a step."""

    config: str
    fields: Mapping[str, Any]
    lora: Mapping[str, Any]
    rows: int
    length: int
    ours: Mapping[str, Mapping[str, Any]]


LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "pad_token_id": 0,
}
GPT_OSS_20B = {"num_local_experts": 32, "num_hidden_layers": 24, "pad_token_id": 0}
DENSE = {
    "cce": {},
    "lora-kernels": {},
    "fused": {"mlp": False, "rope": True},
    "activations": {"policy": "auto"},
}
SPARSE = {
    "gpt-oss-attention": {},
    "cce": {},
    "scattermoe": {},
    "lora-kernels": {},
    "fused": {"experts": False, "rope": True},
    "activations": {"policy": "auto"},
}
SINKS = Case("GptOssConfig", GPT_OSS_20B, {"target_modules": ATTENTION}, 1, 8192, SPARSE)
CASES = {
    "llama-8b, all linear": Case("LlamaConfig", LLAMA_8B, {"target_modules": "all-linear"}, 2, 4096, DENSE),
    "gpt-oss-20b, attention": SINKS,
    "gpt-oss-20b, attention, 16k": replace(SINKS, length=16384),
    "gpt-oss-20b, attention and experts": replace(
        SINKS, lora={"target_modules": ATTENTION, "target_parameters": EXPERTS}
    ),
}

TINY: Mapping[str, Mapping[str, Any]] = {
    "LlamaConfig": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2},
    "GptOssConfig": {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
    },
}


def shrunk(case: Case) -> Case:
    """The same case with two small layers; without a GPU it is said how much memory there is."""
    fields = {**case.fields, **TINY[case.config], "num_hidden_layers": 2, "vocab_size": 1024}
    memory = {} if device() == "cuda" else {"memory_gib": 1.0}
    ours = {**case.ours, "activations": {**case.ours["activations"], **memory}}
    return replace(case, fields=fields, length=256, ours=ours)


def filled(module: PreTrainedModel) -> PreTrainedModel:
    """A module from the meta device with random weights: norms 1, biases 0, the rest normal."""
    module.to_empty(device=device())
    module.tie_weights()
    generator = torch.Generator(device()).manual_seed(0)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim > 1 and "bias" not in name:
                weight.normal_(std=0.02, generator=generator)
            else:
                weight.fill_(1.0 if "norm" in name else 0.0)
    for part in module.modules():
        if type(part).__name__.endswith("RotaryEmbedding"):
            with torch.device(device()):
                part.__init__(part.config)  # Its frequencies are buffers that no checkpoint has.
    return module
