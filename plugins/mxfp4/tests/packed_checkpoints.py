"""Tiny gpt-oss checkpoints, in MXFP4 as they are published and in floating point, and runs that load them."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pegbox import hooks
from pegbox.context import Context
from pegbox.plan import compose
from pegbox.rows import Batch
from pegbox.types import Model, ModelRequest
from pegbox_kernels.mxfp4 import PackedMxfp4
from safetensors.torch import load_file, save_file

SIZES = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 384}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    "llama": {},
}
PARTS = ("gate_up_proj", "down_proj")
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
STORED = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


@cache
def _made(kind: str, packed: bool) -> tempfile.TemporaryDirectory[str]:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **HEADS, **ENDS, **KINDS[kind]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4 if "norm" not in name else 1)
            if "bias" in name or "sinks" in name:
                parameter.normal_(std=0.5)
    made = tempfile.TemporaryDirectory(prefix=f"pegbox-{kind}-")
    model.save_pretrained(made.name)
    if packed:
        _pack(Path(made.name))
    return made


def folder(kind: str = "gpt_oss", packed: bool = True) -> str:
    """A tiny model on disk, until the process ends; `packed`: its experts as blocks and scales."""
    return _made(kind, packed).name


def _pack(path: Path) -> None:
    """Write experts as published gpt-oss checkpoints hold them: (E, out, in / 32, 16) and (E, out, in / 32)."""
    weights = load_file(path / "model.safetensors")
    for name in [name for name in weights if name.endswith(PARTS)]:
        packed = PackedMxfp4.quantize(weights.pop(name).transpose(1, 2))
        weights |= {f"{name}_blocks": packed.blocks, f"{name}_scales": packed.scales}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": STORED}), encoding="utf-8")


def composed(kind: str, plugins: list[str], packed: bool = True, **sections: Any) -> Context:
    named = {"name": folder(kind, packed), "dtype": sections.pop("dtype", "auto")}
    config = {"model": named, "plugins": ["hf", *plugins], "output": f"{named['name']}/run"}
    ctx = compose({**config, **sections})
    ctx.runtime = SimpleNamespace(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    return ctx


def request_of(ctx: Context, meta: bool = False) -> ModelRequest:
    from pegbox.assembly import model_request

    return model_request(ctx, meta=meta)


def prepared(ctx: Context, meta: bool = False) -> Model:
    """The policy as a run prepares it, in training, not placed. Adapter factors are moved off their beginning."""
    request, patches = request_of(ctx, meta), ctx.kernel.patches
    model = ctx.call(hooks.load_model, ctx, request)
    patches.apply(model, ctx.each(hooks.patch_modules, ctx, model, "base"))
    if ctx.owned(hooks.apply_adapters):
        model = ctx.call(hooks.apply_adapters, ctx, model)
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            if "lora_" in name and not meta:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random).to(parameter.device))
    for stage in ("adapted", "recompute"):
        patches.apply(model, ctx.each(hooks.patch_modules, ctx, model, stage))
    model.module.train()
    return model


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
