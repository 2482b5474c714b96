"""What a run leaves: folders that transformers opens as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pegbox import hooks
from pegbox.context import Context
from pegbox.types import ExportRequest, Model, ModelRequest
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

Compose = Callable[..., Context]
IDS = torch.arange(3, 30)[None]


def trained(ctx: Context, rank: int = 0) -> Model:
    """A loaded model whose every weight has moved, as training moves it."""
    ctx.runtime = SimpleNamespace(rank=rank, local_rank=rank, world_size=2)
    ctx.processor = ctx.call(hooks.load_processor, ctx)
    model = ctx.call(hooks.load_model, ctx, ModelRequest(name=ctx.config.run.model.name, format="transformers"))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(1e-4 * torch.randn_like(parameter))
    return model


def export(ctx: Context, model: Model, folder: Path) -> Path:
    folder.mkdir()
    return ctx.call(hooks.export_model, ctx, model, ExportRequest(folder=folder, format="transformers"))


def test_exported_folder_reopens_with_equal_logits(folder: Path, tmp_path: Path, context: Compose) -> None:
    ctx = context(folder)
    model = trained(ctx)
    out = export(ctx, model, tmp_path / "out")
    reopened = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert reopened.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(reopened(IDS).logits, model.module(IDS).logits, rtol=0, atol=0)


def test_exported_folder_holds_tokenizer_template_and_generation_config(
    folder: Path, tmp_path: Path, context: Compose, tokenizer: PreTrainedTokenizerFast
) -> None:
    GenerationConfig(eos_token_id=[2, 5], max_length=77).save_pretrained(folder)
    ctx = context(folder)
    out = export(ctx, trained(ctx), tmp_path / "out")
    reopened = AutoTokenizer.from_pretrained(out)
    assert reopened.chat_template == tokenizer.chat_template
    assert reopened("Paris 12").input_ids == tokenizer("Paris 12").input_ids
    assert GenerationConfig.from_pretrained(out).eos_token_id == [2, 5]
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert sorted(file.suffix for file in out.glob("model*")) == [".safetensors"]


def test_weights_can_be_exported_in_another_dtype(folder: Path, tmp_path: Path, context: Compose) -> None:
    ctx = context(folder, hf={"export_dtype": "bfloat16"})
    model = trained(ctx)
    out = export(ctx, model, tmp_path / "out")
    reopened = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert reopened.dtype == torch.bfloat16
    expected = {name: p.to(torch.bfloat16) for name, p in model.module.named_parameters()}
    assert all(torch.equal(p, expected[name]) for name, p in reopened.named_parameters())
    assert model.module.dtype == torch.float32


def test_tied_weights_are_written_once(
    tmp_path: Path, context: Compose, tiny: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny("Qwen2", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    for name, settings in (("same", {}), ("half", {"export_dtype": "float16"})):
        ctx = context(tmp_path / "tied", hf=settings)
        model = trained(ctx)
        out = export(ctx, model, tmp_path / name)
        with safe_open(out / "model.safetensors", "pt") as file:
            assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        reopened = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(reopened(IDS).logits, model.module(IDS).logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rank", [1])
def test_only_the_first_process_writes(rank: int, folder: Path, tmp_path: Path, context: Compose) -> None:
    ctx = context(folder)
    out = export(ctx, trained(ctx, rank), tmp_path / "out")
    assert list(out.iterdir()) == []
