"""Tiny models of several families, loaded by the plugin `hf`, with and without this plugin."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox import hooks
from pegbox.assembly import model_request
from pegbox.patches import PatchLog
from pegbox.plan import compose
from pegbox.testing import FakeRuntime

sys.path.insert(0, str(Path(__file__).parent))

from document_batches import Run

WINDOW = 4
SHAPE: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 16}
"""All of them for every token: no rounding sends one elsewhere."""
BOTH = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {**BOTH, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**BOTH, "query_pre_attn_scalar": 16},
    "deepseek_v3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 4,
        "head_dim": 8,
    },
    "gpt_oss": {**BOTH, **EXPERTS},
    "qwen2_moe": {**BOTH, **EXPERTS, "use_sliding_window": True, "shared_expert_intermediate_size": 16},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`folder("mistral")`: a tiny random model as its author would publish it, made once."""
    transformers = pytest.importorskip("transformers")
    made: dict[str, Path] = {}

    def make(family: str, **changes: Any) -> Path:
        key = f"{family}-{'-'.join(f'{name}={value}' for name, value in changes.items())}"
        if key not in made:
            config = transformers.AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family], **changes})
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():  # zero biases and equal sinks would hide what is not used
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            made[key] = tmp_path_factory.mktemp("models") / key
            model.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture
def load(folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Run]:
    """`load("llama", "pegbox")` loads and patches a model; `load("llama", None)` loads it with eager attention.

    With `runtime=None` there is no device to look at, as in a plan.
    """

    def make(
        family: str,
        section: str | Mapping[str, Any] | None,
        *more: str,
        meta: bool = False,
        runtime: Any = FakeRuntime,
        **sections: Any,
    ) -> Run:
        plugins = ["hf", *(["attention"] if section is not None else []), *more]
        own = {"attention": {"implementation": section} if isinstance(section, str) else dict(section or {})}
        config = {"model": {"name": str(folder(family))}, "plugins": plugins, "output": str(tmp_path / "run")}
        sections = {**(own if section is not None else {"hf": {"attention": "eager"}}), **sections}
        ctx, log = compose({**config, **sections}), PatchLog()
        if runtime is not None and not meta:
            ctx.runtime = runtime()
        model = ctx.call(hooks.load_model, ctx, model_request(ctx, meta=meta))
        if not meta:
            model.module.to("cpu" if runtime is None else ctx.runtime.device).train()
        log.apply(model, ctx.each(hooks.patch_attention, ctx, model))
        if "lora" in plugins:
            model = ctx.call(hooks.apply_adapters, ctx, model)
        for stage in ("adapted", "recompute"):
            log.apply(model, ctx.each(hooks.patch_modules, ctx, model, stage))
        return Run(ctx, replace(model, role="policy"), log)

    return make
