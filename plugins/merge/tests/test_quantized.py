"""Bases that bitsandbytes quantized: stored so, or while they were loaded for training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from pegbox_merge.fidelity import check
from pegbox_merge.merging import MergeRequest, write_merged
from pegbox_merge.runs import open_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

pytest.importorskip("bitsandbytes")
SETTINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
PLUGIN = """
import torch
from pegbox.hooks import hookimpl
from pegbox.types import ModelOptions
from transformers import BitsAndBytesConfig


class Plugin:
    @hookimpl
    def configure_model(self, ctx):
        return ModelOptions(quantization=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
"""


def quantized(base: Path, settings: dict) -> torch.nn.Module:
    config = BitsAndBytesConfig(**settings)
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=config, device_map="cpu")


def dequantized(base: Path, settings: dict) -> dict[str, torch.Tensor]:
    """By transformers."""
    return {name: tensor.float() for name, tensor in quantized(base, settings).dequantize().state_dict().items()}


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_stored_quantized_base_is_dequantized_and_merged(
    kind: str, bases: Callable, adapter_on: Callable, tmp_path: Path
) -> None:
    plain = bases("llama", torch.float16)
    run = adapter_on(plain, target_modules="all-linear")
    base = tmp_path / "quantized"
    quantized(plain, SETTINGS[kind]).save_pretrained(base)
    trained = open_run(run, str(base))
    done = write_merged(trained, MergeRequest(tmp_path / "merged"))
    assert "dequantized" in trained.onto
    assert "quantization_config" not in json.loads((done.folder / "config.json").read_text())
    made = load_file(done.folder / "model.safetensors")
    delta = deltas(plain, run)
    for name, tensor in dequantized(plain, SETTINGS[kind]).items():
        torch.testing.assert_close(made[name].float(), tensor + delta.get(name, 0), rtol=5e-3, atol=5e-3, msg=name)


def deltas(base: Path, run: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(model, run).merge_and_unload().state_dict()
    return {name: tensor - before[name] for name, tensor in merged.items()}


def run_folder(run: Path, base: Path) -> Path:
    """Makes the adapter's folder a run's, trained on a base that was quantized while it was loaded."""
    (run / "quantizing.py").write_text(PLUGIN)
    plugins = f"[{run / 'quantizing.py'}, hf]"
    (run / "config.yaml").write_text(f"model: {{name: {base}}}\nplugins: {plugins}\n")
    return run


@pytest.mark.parametrize("onto", ["trained", "published"])
def test_a_base_that_was_quantized_for_training_is_merged_as_trained_or_as_published(
    onto: str, bases: Callable, adapter_on: Callable, tmp_path: Path
) -> None:
    base = bases("llama", torch.float16)
    run = run_folder(adapter_on(base, target_modules="all-linear"), base)
    trained = open_run(run, onto=onto)
    done = write_merged(trained, MergeRequest(tmp_path / "merged"))
    delta = deltas(base, run)
    expected = load_file(base / "model.safetensors")
    if onto == "trained":
        expected = dequantized(base, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    made = load_file(done.folder / "model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(made[name].float(), tensor.float() + delta[name], rtol=5e-3, atol=5e-3, msg=name)
    assert ("quantized" in trained.onto) == (onto == "trained") or "published" in trained.onto
    figures = check(trained, done)
    assert figures.kl < 1e-3
