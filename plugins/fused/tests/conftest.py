"""Tiny models of several families, and the plugin's patches on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox import hooks
from pegbox.context import Context
from pegbox.patches import PatchLog
from pegbox.plan import compose
from pegbox.types import Model

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {},
    "cohere": {},
    "glm4": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, **EXPERTS},
    "qwen3_next": {"num_experts": 4, "layer_types": ["linear_attention", "full_attention"], **EXPERTS, **LINEAR},
}
"""Model types, and what their configs need beyond `SHAPE`."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def network() -> Callable[[str], Model]:
    """`network("llama")`: a tiny model."""
    return make_network


def make_network(family: str) -> Model:
    """A model of two layers with random weights, the same each time; weights of norms are not one."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return Model(module=module.train(), name=family, base=family, format="transformers", compute=lambda *_: None)  # type: ignore[arg-type,return-value]


@pytest.fixture
def context(tmp_path: Path) -> Callable[..., Context]:
    """`context(rope=True)`: a run with the plugin and this section."""
    return partial(make_context, tmp_path)


def make_context(folder: Path, **section: Any) -> Context:
    return compose({"model": {"name": "x"}, "plugins": ["fused"], "fused": section, "output": str(folder / "run")})


@pytest.fixture
def patched(tmp_path: Path) -> Callable[..., PatchLog]:
    """`patched(model, rope=True)`: apply the plugin's patches; the log of what was applied."""

    def apply(model: Model, **section: Any) -> PatchLog:
        ctx, log = make_context(tmp_path, **section), PatchLog()
        log.apply(model, ctx.each(hooks.patch_modules, ctx, model, "base"))
        return log

    return apply


@pytest.fixture
def outcome() -> Callable[[Model], tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """`outcome(model)`: the loss, and the gradients by name."""
    return train_once


def train_once(model: Model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss on some tokens, and every gradient."""
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    model.module.zero_grad()
    loss = model.module(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}
    return loss.detach(), gradients
