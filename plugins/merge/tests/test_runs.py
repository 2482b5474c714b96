"""Runs of Pegbox, merged: what they were loaded with is what they are merged with."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exported_runs import record, trained
from pegbox.errors import UserError
from pegbox_merge.command import merge
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer


@pytest.mark.parametrize(
    ("kind", "lora"),
    [("llama", {"use_dora": True}), ("qwen3-moe", {"parameters": ["experts.gate_up_proj", "experts.down_proj"]})],
)
def test_a_trained_run_is_merged_and_checked(kind: str, lora: dict, bases: Callable, tmp_path: Path) -> None:
    run = trained(bases(kind), tmp_path / "run", lora=lora)
    merge(run)
    told = record(run)
    assert told["status"] == "checked"
    assert told["check"]["kl"] < 1e-6 < 1e-3 < told["check"]["kl_base"]


def test_settings_that_the_run_changed_are_in_the_merged_config(bases: Callable, tmp_path: Path) -> None:
    changes = {"rms_norm_eps": 0.01}
    run = trained(bases("llama"), tmp_path / "run", hf={"config_overrides": changes})
    merge(run)
    assert record(run)["status"] == "checked"
    assert json.loads((run / "merged" / "config.json").read_text())["rms_norm_eps"] == 0.01


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_tokens_that_the_run_added_are_in_the_merged_model(kind: str, bases: Callable, tmp_path: Path) -> None:
    tokens = [f"<tag-{index}>" for index in range(6)]
    lora = {"tokens": tokens, "token_modules": ["embed_tokens"] if kind == "tied" else ["embed_tokens", "lm_head"]}
    run = trained(bases(kind), tmp_path / "run", hf={"new_tokens": tokens, "embedding_multiple": 8}, lora=lora)
    merge(run)
    assert record(run)["status"] == "checked"
    model = AutoModelForCausalLM.from_pretrained(run / "merged")
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 264
    assert len(AutoTokenizer.from_pretrained(run / "merged")("<tag-5>")["input_ids"]) == 1
    stored = load_file(bases(kind) / "model.safetensors")["model.embed_tokens.weight"]
    assert stored.shape[0] == 260


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_on_a_quantized_base_is_merged_as_trained(kind: str, bases: Callable, tmp_path: Path) -> None:
    run = trained(bases("llama"), tmp_path / "run", plugins=("bnb",), bnb={"kind": kind})
    merge(run)
    told = record(run)
    assert told["status"] == "checked"
    assert "quantized, and dequantized again" in told["onto"]


def test_added_tokens_whose_rows_are_nowhere_written_are_refused(bases: Callable, tmp_path: Path) -> None:
    lora = {"tokens": ["<new>"]}
    run = trained(bases("llama"), tmp_path / "run", hf={"new_tokens": ["<new>"], "embedding_multiple": 8}, lora=lora)
    with pytest.raises(UserError, match=r"lm_head\.weight is stored with the shape \[260, 64\]"):
        merge(run)
    assert not (run / "merged").exists()


def test_a_language_model_that_was_trained_alone_is_merged_into_the_whole(bases: Callable, tmp_path: Path) -> None:
    run = trained(bases("llava"), tmp_path / "run", hf={"text_only": True})
    merge(run)
    assert record(run)["status"] == "checked"
    stored = load_file(bases("llava") / "model.safetensors")
    made = load_file(run / "merged" / "model.safetensors")
    assert made.keys() == stored.keys()
    changed = {name for name, tensor in stored.items() if not torch.equal(made[name], tensor)}
    assert changed == {name for name in stored if "language_model" in name and "_proj." in name}
    whole = AutoModelForImageTextToText.from_pretrained(run / "merged", output_loading_info=True)[1]
    assert not whole["missing_keys"]
