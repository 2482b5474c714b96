"""The language model alone, out of a model that also sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from pegbox import hooks
from pegbox.context import Context
from pegbox.errors import ConfigError, UserError
from pegbox.rows import Batch
from pegbox.types import ExportRequest, Model, ModelRequest
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerFast

Compose = Callable[..., Context]
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
TEXT = {name: value for name, value in SHAPE.items() if name != "head_dim"}


def seeing(family: str) -> PreTrainedModel:
    """A tiny random model of text and images."""
    torch.manual_seed(0)
    if family == "Llava":
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**VISION, image_size=8, patch_size=4, projection_dim=16),
            text_config=transformers.LlamaConfig(**TEXT),
            image_token_index=300,
        )
    elif family == "Gemma3":
        vision = transformers.SiglipVisionConfig(**VISION, image_size=8, patch_size=4)
        text = transformers.Gemma3TextConfig(**SHAPE, sliding_window=4)
        config = transformers.Gemma3Config(
            vision_config=vision.to_dict(), text_config=text.to_dict(), mm_tokens_per_image=4
        )
    else:
        config = transformers.Qwen2_5_VLConfig(
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 32,
            },
            text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        )
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def load(ctx: Context, meta: bool = False) -> Model:
    return ctx.call(
        hooks.load_model, ctx, ModelRequest(name=ctx.config.run.model.name, format="transformers", meta=meta)
    )


@pytest.mark.parametrize("family", ["Llava", "Gemma3"])
def test_the_language_model_is_exactly_the_one_inside(
    family: str, tmp_path: Path, context: Compose, tokenizer: PreTrainedTokenizerFast, batch: Callable[..., Batch]
) -> None:
    whole, rows = seeing(family), batch()
    whole.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    ctx = context(tmp_path / "m", hf={"text_only": True})
    model = load(ctx)
    assert not any("vision" in name or "projector" in name for name, _ in model.module.named_parameters())
    with torch.no_grad():
        theirs = whole(input_ids=rows.input_ids_BT).logits
        torch.testing.assert_close(model.module(input_ids=rows.input_ids_BT).logits, theirs, rtol=1e-5, atol=1e-5)
        ours_NV = model.compute(model.module, rows, frozenset({"logits"})).logits_NV
    torch.testing.assert_close(ours_NV, theirs.flatten(0, 1)[rows.trained_N], rtol=1e-4, atol=1e-4)
    inside = dict(whole.get_decoder().named_parameters())
    for name, parameter in model.module.get_decoder().named_parameters():
        assert torch.equal(parameter, inside[name]), name

    ctx.processor, ctx.runtime = ctx.call(hooks.load_processor, ctx), type("One", (), {"rank": 0})()
    (tmp_path / "out").mkdir()
    ctx.call(hooks.export_model, ctx, model, ExportRequest(folder=tmp_path / "out", format="transformers"))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert opened.config.model_type == {"Llava": "llama", "Gemma3": "gemma3_text"}[family]
    with torch.no_grad():
        torch.testing.assert_close(opened(input_ids=rows.input_ids_BT).logits, theirs, rtol=1e-5, atol=1e-5)


def test_without_weights_it_has_the_same_shape(tmp_path: Path, context: Compose) -> None:
    seeing("Gemma3").save_pretrained(tmp_path / "m")
    ctx = context(tmp_path / "m", hf={"text_only": True})
    real, meta = (dict(load(ctx, meta).module.named_parameters()) for meta in (False, True))
    assert {name: p.shape for name, p in real.items()} == {name: p.shape for name, p in meta.items()}


def test_a_text_part_that_cannot_stand_alone_is_refused(tmp_path: Path, context: Compose) -> None:
    seeing("Qwen2_5_VL").save_pretrained(tmp_path / "m")
    with pytest.raises(ConfigError, match="no language model of type 'qwen2_5_vl_text'"):
        load(context(tmp_path / "m", hf={"text_only": True}))


def test_a_model_of_text_has_nothing_to_leave_out(folder: Path, context: Compose) -> None:
    with pytest.raises(ConfigError, match="has no parts other than text"):
        load(context(folder, hf={"text_only": True}))


def test_a_model_that_also_sees_points_to_the_setting(tmp_path: Path, context: Compose) -> None:
    seeing("Llava").save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match=r"hf: \{text_only: true\}"):
        load(context(tmp_path / "m"))
