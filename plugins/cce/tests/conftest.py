"""Tiny models loaded by the plugin `hf`, with and without the patch; and a tiny run on text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
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
    "biased": ("phi", {}),
}
"""Model type and further settings of each kind."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def saved(kind: str, folder: Path) -> Path:
    """The folder of a tiny random model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model_type, further = KINDS[kind]
    shape = {name: value for name, value in SHAPE.items() if model_type != "phi" or name != "head_dim"}
    config = transformers.AutoConfig.for_model(model_type, **shape, **further)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("lm_head.bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / kind)
    return folder / kind


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Model]:
    """`load("tied", {"logits_gib": 1e-5})`: a tiny model, its head patched if there are settings."""

    def make(kind: str = "plain", cce: dict[str, Any] | None = None, plugin: Any = None, **lora: Any) -> Model:
        folder = saved(kind, tmp_path)
        plugins = ["hf", *([] if cce is None else ["cce"]), *(["lora"] if lora else [])]
        sections = ({} if cce is None else {"cce": cce}) | ({"lora": lora} if lora else {})
        config = {"model": {"name": str(folder)}, "plugins": plugins, "output": str(tmp_path / "run"), **sections}
        ctx = compose(config, instances={"cce": plugin} if plugin else {})
        ctx.runtime = SimpleNamespace(rank=0, local_rank=0, world_size=1, precision="fp32")
        model = ctx.call(hooks.load_model, ctx, ModelRequest(name=str(folder), format="transformers"))
        log = PatchLog()
        log.apply(model, ctx.each(hooks.patch_modules, ctx, model, "base"))
        if lora:
            model = ctx.call(hooks.apply_adapters, ctx, model)
        log.apply(model, ctx.each(hooks.patch_modules, ctx, model, "adapted"))
        model.module.train()
        return replace(model, role="policy")

    return make


@pytest.fixture
def tiny_run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`tiny_run("with", plugins=["cce"])`: the config of a short run of `hf` on text, its output at that name."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = [f"w{number}" for number in range(300)]
    vocabulary = {"<pad>": 0, "<end>": 1, **{word: number + 2 for number, word in enumerate(words)}}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")
    source = random.Random(0)
    rows = [{"text": " ".join(source.choices(words, k=source.randint(5, 20)))} for _ in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(name: str, kind: str = "plain", plugins: tuple[str, ...] = (), **sections: Any) -> dict[str, Any]:
        folder = saved(kind, tmp_path)
        tokenizer.save_pretrained(folder)
        return {
            "model": {"name": str(folder)},
            "plugins": ["hf", "data", *plugins, "sft", "adamw", "trainer"],
            "data": {"train": [{"path": str(tmp_path / "rows.jsonl"), "format": "pretraining"}]},
            "adamw": {"learning_rate": 1e-2},
            "trainer": {"max_steps": 6, "micro_batch": 2, "accumulation": 2, "log_every": 1, "progress": "none"},
            "output": str(tmp_path / name),
            **sections,
        }

    return config
