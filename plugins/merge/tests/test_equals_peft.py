"""A merged folder holds the weights that PEFT's `merge_and_unload` makes, for each kind of adapter and base."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pegbox_merge.fidelity import check
from pegbox_merge.merging import MergeRequest, write_merged
from pegbox_merge.runs import open_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

QV = ["q_proj", "v_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": "all-linear"}),
    "rslora": ("llama", {"target_modules": QV, "use_rslora": True}),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8},
            "alpha_pattern": {"v_proj": 32},
        },
    ),
    "modules_to_save": ("llama", {"target_modules": QV, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "saved norm": ("llama", {"target_modules": QV, "modules_to_save": ["input_layernorm"]}),
    "tokens": ("llama", {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [3, 200]}}),
    "tied tokens": ("tied", {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [3, 200]}}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "bias": ("biased", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "tied": ("tied", {"target_modules": "all-linear"}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "conv1d dora": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "experts": ("qwen3-moe", {"target_modules": QV, "target_parameters": EXPERTS}),
    "rslora experts": ("mixtral", {"target_modules": [], "target_parameters": EXPERTS, "use_rslora": True}),
}


def by_peft(base: Path, run: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    merged = peft.PeftModel.from_pretrained(model, run).merge_and_unload()
    return {name: tensor.detach() for name, tensor in merged.state_dict().items()}


def ours(run: Path, output: Path, **request: Any) -> tuple[dict[str, torch.Tensor], Any]:
    trained = open_run(run)
    done = write_merged(trained, MergeRequest(output, **request))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained(output)
    return model.state_dict(), (trained, done)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_equal_those_of_peft(kind: str, bases: Callable, adapter_on: Callable, tmp_path: Path) -> None:
    name, settings = KINDS[kind]
    base = bases(name)
    run = adapter_on(base, **settings)
    made, (trained, done) = ours(run, tmp_path / "merged")
    expected = by_peft(base, run)
    assert made.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(made[key], tensor, rtol=1e-5, atol=1e-5, msg=key)
    assert any(not torch.equal(made[key], tensor) for key, tensor in by_base(base).items())
    figures = check(trained, done)
    assert figures.kl < 1e-6 < figures.kl_base
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["status"] == "checked"


def by_base(base: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(base).state_dict()


@pytest.mark.parametrize("kind", ["lora", "dora", "experts", "modules_to_save"])
def test_in_bfloat16_the_merge_is_as_near_to_the_exact_one_as_pefts(
    kind: str, bases: Callable, adapter_on: Callable, tmp_path: Path
) -> None:
    name, settings = KINDS[kind]
    base = bases(name, torch.bfloat16)
    run = adapter_on(base, **settings)
    made, _ = ours(run, tmp_path / "merged")
    exact, theirs = by_peft(base, run), by_peft(base, run, torch.bfloat16)
    for key, tensor in exact.items():
        assert made[key].dtype == torch.bfloat16
        own = (made[key].float() - tensor).abs().max()
        assert own <= 2 * (theirs[key].float() - tensor).abs().max() + 1e-6, key


@pytest.mark.parametrize("kind", ["qwen3-moe", "mixtral"])
def test_experts_are_stored_one_by_one_as_in_the_base(
    kind: str, bases: Callable, adapter_on: Callable, tmp_path: Path
) -> None:
    base = bases(kind)
    stored = load_file(base / "model.safetensors")
    assert any(".experts.3." in name for name in stored)
    run = adapter_on(base, target_modules=QV, target_parameters=EXPERTS[:1])
    ours(run, tmp_path / "merged")
    made = load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in made.items()} == {n: t.shape for n, t in stored.items()}
    for name, tensor in stored.items():
        changes = any(part in name for part in ("q_proj", "v_proj", "gate_proj", "up_proj", ".w1.", ".w3."))
        assert torch.equal(made[name], tensor) != changes, name


def test_a_weight_that_is_not_adapted_is_copied_to_the_bit(
    bases: Callable, adapter_on: Callable, tmp_path: Path
) -> None:
    base = bases("llama", torch.bfloat16)
    ours(adapter_on(base, target_modules=["q_proj"]), tmp_path / "merged")
    made = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in load_file(base / "model.safetensors").items():
        assert torch.equal(made[name], tensor) != ("q_proj" in name), name


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_data_type_can_be_chosen(dtype: str, bases: Callable, adapter_on: Callable, tmp_path: Path) -> None:
    base = bases("llama", torch.bfloat16)
    made, _ = ours(adapter_on(base, target_modules=QV), tmp_path / "merged", dtype=dtype)
    assert {tensor.dtype for tensor in made.values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype


def test_a_head_that_was_trained_apart_from_tied_embeddings_is_untied(
    bases: Callable, adapter_on: Callable, tmp_path: Path
) -> None:
    base = bases("tied")
    run = adapter_on(base, target_modules=QV, modules_to_save=["lm_head"])
    made, (trained, done) = ours(run, tmp_path / "merged")
    assert not torch.equal(made["lm_head.weight"], made["model.embed_tokens.weight"])
    assert torch.equal(made["model.embed_tokens.weight"], by_base(base)["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    assert check(trained, done).kl < 1e-6


def test_shards_have_the_asked_size_and_an_index(bases: Callable, adapter_on: Callable, tmp_path: Path) -> None:
    base = bases("llama")
    run = adapter_on(base, target_modules=QV)
    made, _ = ours(run, tmp_path / "merged", max_shard_size="100KB")
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size <= 110_000 for file in files)
    for key, tensor in by_peft(base, run).items():
        torch.testing.assert_close(made[key], tensor, rtol=1e-5, atol=1e-5, msg=key)
