"""The exported adapter, opened by PEFT and by transformers: the same function as the trained model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from pegbox import hooks
from pegbox.context import Context
from pegbox.testing.tiny import tiny_model
from pegbox.types import ExportRequest, Model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

Adapt = Callable[..., tuple[Context, Model]]
IDS = torch.arange(24).reshape(2, 12)
KINDS = [
    {},
    {"use_dora": True, "use_rslora": True},
    {"modules_to_save": ["lm_head"], "targets": ["q_proj"]},
    {"layers": [1], "alpha": 3},
    {"targets": r".*\.1\..*_proj", "exclude": r".*\.up_proj"},
    {"rank_pattern": {r"layers\.1\..*q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
    {"targets": ["q_proj"], "tokens": [3, 7]},
    {"targets": ["q_proj"], "tokens": [3, 7], "token_modules": ["embed_tokens", "lm_head"]},
    {"targets": ["q_proj", "embed_tokens", "lm_head"]},
    {"targets": ["q_proj"], "modules_to_save": ["norm", "embed_tokens"]},
    {"init": "orthogonal", "r": 4, "dropout": 0.1},
]


def exported(adapt: Adapt, base: Path, folder: Path, **settings: object) -> Model:
    model = replace(tiny_model(), base=str(base), name="tiny")
    ctx, adapted = adapt(model, **settings)
    folder.mkdir()
    request = ExportRequest(folder=folder, format="peft")
    assert ctx.call(hooks.export_model, ctx, adapted, request) == folder
    return adapted


@pytest.mark.parametrize("settings", KINDS)
def test_peft_opens_the_folder_with_equal_logits(settings: dict, adapt: Adapt, base: Path, tmp_path: Path) -> None:
    adapted = exported(adapt, base, tmp_path / "run", **settings)
    adapted.module.eval()
    reopened = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run").eval()
    with torch.no_grad():
        torch.testing.assert_close(reopened(IDS).logits, adapted.module(IDS).logits, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{}, {"layers": [1], "alpha": 3}])
def test_transformers_opens_the_folder_alone(settings: dict, adapt: Adapt, base: Path, tmp_path: Path) -> None:
    adapted = exported(adapt, base, tmp_path / "run", **settings)
    adapted.module.eval()
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad():
        torch.testing.assert_close(reopened(IDS).logits, adapted.module(IDS).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", KINDS)
def test_merging_gives_the_same_model(settings: dict, adapt: Adapt, base: Path, tmp_path: Path) -> None:
    adapted = exported(adapt, base, tmp_path / "run", **settings)
    adapted.module.eval()
    wrapped = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run")
    merged = wrapped.merge_and_unload().eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, adapted.module(IDS).logits, rtol=1e-4, atol=1e-4)


def test_the_folder_is_complete(adapt: Adapt, base: Path, tmp_path: Path) -> None:
    exported(adapt, base, tmp_path / "run", r=4)
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "generation_config.json",
        "chat_template.jinja",
    } <= names
    assert "model.safetensors" not in names
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert (config["peft_type"], config["task_type"], config["inference_mode"]) == ("LORA", "CAUSAL_LM", True)
    assert (config["r"], config["lora_alpha"]) == (4, 32)
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == "{{ messages[0]['content'] }}"
    assert GenerationConfig.from_pretrained(tmp_path / "run").eos_token_id == 258


def test_only_the_adapter_is_saved_and_in_its_own_dtype(adapt: Adapt, base: Path, tmp_path: Path) -> None:
    model = replace(tiny_model(), base=str(base))
    model.module.to(torch.bfloat16)
    ctx, adapted = adapt(model, r=2)
    (tmp_path / "run").mkdir()
    ctx.call(hooks.export_model, ctx, adapted, ExportRequest(folder=tmp_path / "run", format="peft"))
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(name.startswith("base_model.model.model.layers.") and ".lora_" in name for name in weights)
    assert len(weights) == 2 * 7 * 2


def test_exporting_leaves_the_model_trainable(adapt: Adapt, base: Path, tmp_path: Path) -> None:
    adapted = exported(adapt, base, tmp_path / "run")
    assert not adapted.module.peft_config["default"].inference_mode
    assert any(p.requires_grad for p in adapted.module.parameters())
