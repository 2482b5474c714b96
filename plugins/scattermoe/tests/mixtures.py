"""Tiny mixtures of experts on disk, and the run that loads, patches and adapts them."""

from __future__ import annotations

import tempfile
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from pegbox import hooks
from pegbox.context import Context
from pegbox.patches import PatchLog
from pegbox.plan import compose
from pegbox.rows import Batch
from pegbox.types import Model, ModelRequest

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 384}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 7.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "num_experts_per_tok": 2,
    },
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@cache
def _made(kind: str) -> tempfile.TemporaryDirectory[str]:
    """A tiny model of this type on disk; its weights are large enough for activations to bend."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **HEADS, **ENDS, **KINDS[kind]})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4 if "norm" not in name else 1)
            if "bias" in name or "sinks" in name:
                parameter.normal_(std=0.5)
    made = tempfile.TemporaryDirectory(prefix=f"pegbox-{kind}-")
    model.save_pretrained(made.name)
    return made


def folder(kind: str) -> str:
    """Where it lies, until the process ends."""
    return _made(kind).name


def composed(kind: str, plugins: list[str], **sections: Any) -> Context:
    named = {"name": folder(kind), "dtype": sections.pop("dtype", "auto")}
    config = {"model": named, "plugins": ["hf", *plugins], "output": f"{folder(kind)}/run"}
    ctx = compose({**config, **sections})
    ctx.runtime = SimpleNamespace(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    return ctx


def loaded(kind: str) -> Model:
    """A tiny model as the plugin `hf` loads it."""
    ctx = composed(kind, [])
    model = ctx.call(hooks.load_model, ctx, ModelRequest(name=folder(kind), format="transformers"))
    model.module.train()
    return model


def assembled(kind: str, plugins: list[str], **sections: Any) -> tuple[Model, PatchLog]:
    """A policy as a run prepares it, in training, not placed. Adapter factors are moved off their beginning."""
    ctx = composed(kind, plugins, **sections)
    log = PatchLog()
    model = ctx.call(hooks.load_model, ctx, ModelRequest(name=folder(kind), format="transformers"))
    log.apply(model, ctx.each(hooks.patch_modules, ctx, model, "base"))
    if ctx.owned(hooks.apply_adapters):
        model = ctx.call(hooks.apply_adapters, ctx, model)
        random = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.module.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=random).to(parameter.device))
    for stage in ("adapted", "recompute"):
        log.apply(model, ctx.each(hooks.patch_modules, ctx, model, stage))
    model.module.train()
    return model, log


def logps(model: Model, batch: Batch) -> torch.Tensor:
    found = model.compute(model.module, batch, frozenset({"logps"})).logps_N
    assert found is not None
    return found


def gradients(model: Model, batch: Batch) -> dict[str, torch.Tensor]:
    """Gradients of a weighted sum of log-probabilities, by name."""
    model.module.zero_grad()
    values = logps(model, batch)
    (values * torch.linspace(0.5, 1.5, len(values), device=values.device)).sum().backward()
    return {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}
