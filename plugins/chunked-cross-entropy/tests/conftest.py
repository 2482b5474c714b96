"""A tiny model loaded by the plugin `hf`, with and without the patch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox import hooks
from pegbox.patches import PatchLog
from pegbox.plan import compose
from pegbox.types import Model, ModelRequest

SHAPE = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "scaled": ("cohere", {"logit_scale": 0.25}),
    "capped": ("gemma2", {"final_logit_softcapping": 5.0}),
}
"""Model type and further settings of each kind."""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Model]:
    """`load("tied", chunk=3)`: a tiny model, its head patched if there is a chunk."""

    def make(kind: str = "plain", chunk: int | None = None, **lora: Any) -> Model:
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        folder = tmp_path / kind
        model_type, further = KINDS[kind]
        config = transformers.AutoConfig.for_model(model_type, **SHAPE, **further)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        plugins = ["hf", *(["chunked-cross-entropy"] if chunk else []), *(["lora"] if lora else [])]
        sections = {"chunked-cross-entropy": {"chunk": chunk}} if chunk else {}
        sections |= {"lora": lora} if lora else {}
        ctx = compose({"model": {"name": str(folder)}, "plugins": plugins, "output": str(tmp_path / "run"), **sections})
        model = ctx.call(hooks.load_model, ctx, ModelRequest(name=str(folder), format="transformers"))
        log = PatchLog()
        log.apply(model, ctx.each(hooks.patch_modules, ctx, model, "base"))
        if lora:
            model = ctx.call(hooks.apply_adapters, ctx, model)
        model.module.train()
        return replace(model, role="policy")

    return make
