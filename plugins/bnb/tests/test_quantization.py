"""What is quantized, what is not, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from pegbox import hooks
from pegbox.assembly import model_request
from pegbox.context import Context
from pegbox.errors import ConfigError, RunError, UserError
from pegbox.plan import compose, plan_model
from pegbox.testing.tiny import tiny_model
from pegbox.types import Model, ModelRequest
from pegbox_bnb.inspection import quantized_layers
from pydantic import ValidationError

Load = Callable[..., tuple[Context, Model]]
LINEAR = 14
"""Linear layers of the tiny model's two blocks: four of attention, three of the feed-forward network."""


@pytest.mark.parametrize(
    ("kind", "trait"), [("nf4", "quantized_4bit"), ("fp4", "quantized_4bit"), ("int8", "quantized_8bit")]
)
def test_all_linear_layers_but_the_head_are_quantized(kind: str, trait: str, load: Load) -> None:
    _, model = load(kind=kind)
    layers = quantized_layers(model.module)
    assert len(layers) == LINEAR
    assert not any("lm_head" in name for name in layers)
    assert {"quantized", trait} <= model.traits
    for layer in layers.values():
        assert layer.weight.dtype == (torch.int8 if kind == "int8" else torch.uint8)
        if kind != "int8":
            assert layer.weight.quant_type == kind


def test_settings_reach_the_layers(load: Load) -> None:
    for double in (True, False):
        _, model = load(double_quant=double, compute_dtype="bfloat16", storage_dtype="bfloat16")
        layer = model.module.model.layers[0].mlp.up_proj
        assert layer.weight.quant_state.nested == double
        assert layer.compute_dtype == torch.bfloat16
        assert layer.weight.dtype == torch.bfloat16
    _, model = load(kind="int8", outlier_threshold=3.5)
    assert model.module.model.layers[0].mlp.up_proj.state.threshold == 3.5


def test_weights_are_those_that_bitsandbytes_makes_of_the_full_ones(load: Load) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    _, model = load(double_quant=False)
    full = tiny_model().module.model.layers[1].mlp.down_proj.weight
    weight = model.module.model.layers[1].mlp.down_proj.weight
    expected = dequantize_4bit(*quantize_4bit(full.data, quant_type="nf4"))
    torch.testing.assert_close(dequantize_4bit(weight.data, weight.quant_state).to(full.dtype), expected)


def test_skipped_layers_stay_as_they_are(load: Load) -> None:
    _, model = load(skip=("down_proj", r"model\.layers\.0\.self_attn"))
    layers = quantized_layers(model.module)
    assert len(layers) == LINEAR - 2 - 4
    assert not any("down_proj" in name or "layers.0.self_attn" in name for name in layers)


def test_a_tied_head_stays_the_embeddings(tmp_path: Path, base: Path, load: Load) -> None:
    tiny_model(tie_word_embeddings=True).module.save_pretrained(tmp_path / "tied")
    _, model = load(tmp_path / "tied", adapt=True)
    module = model.module
    assert module.get_output_embeddings().weight is module.get_input_embeddings().weight
    assert module.get_input_embeddings().weight.is_floating_point()


def test_a_plan_knows_the_traits_without_reading_weights(base: Path) -> None:
    plan = plan_model(compose({"model": {"name": str(base)}, "plugins": ["hf", "bnb", "lora"]}))
    assert {"quantized", "quantized_4bit"} <= set(plan.model["traits"])


def test_second_models_are_not_quantized_unless_they_ask(load: Load, base: Path) -> None:
    ctx, _ = load()
    reference = ctx.call(hooks.load_model, ctx, ModelRequest(name=str(base), format="transformers", role="reference"))
    assert not quantized_layers(reference.module)
    assert "quantized" not in reference.traits
    asked = ModelRequest(name=str(base), format="transformers", role="reference", options=model_request(ctx).options)
    assert len(quantized_layers(ctx.call(hooks.load_model, ctx, asked).module)) == LINEAR


def test_without_an_adapter_it_is_refused(load: Load) -> None:
    with pytest.raises(ConfigError, match="no plugin applies adapters") as raised:
        load(plugins=["hf", "bnb"])
    assert "Add lora" in raised.value.next


def test_a_skipped_name_that_matches_nothing_is_refused(load: Load) -> None:
    for meta in (True, False):
        with pytest.raises(ConfigError, match=r"'dwn_proj' matches no linear layer(.|\n)*Did you mean 'down_proj'"):
            load(skip=("dwn_proj",), meta=meta)


def test_skipping_everything_is_refused(load: Load) -> None:
    with pytest.raises(RunError, match="quantized no layer"):
        load(skip=("model",))


def test_stacked_experts_are_refused_or_kept_knowingly(tmp_path: Path, load: Load) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.MixtralConfig(**shape, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    for meta in (True, False):
        with pytest.raises(ConfigError, match=r"experts in 2 stacked weights such as .*experts\.gate_up_proj"):
            load(tmp_path / "moe", meta=meta)
    _, model = load(tmp_path / "moe", experts="keep")
    assert model.module.model.layers[0].mlp.experts.gate_up_proj.is_floating_point()
    assert "quantized" in model.traits


def test_a_checkpoint_that_is_quantized_already_is_refused(tmp_path: Path, load: Load) -> None:
    _, model = load(double_quant=False)
    model.module.save_pretrained(tmp_path / "ready")
    with pytest.raises(UserError, match=r"quantized already \(bitsandbytes\)"):
        load(tmp_path / "ready")
    _, again = load(tmp_path / "ready", plugins=["hf", "lora"], adapt=True)
    assert "quantized" in again.traits
    assert len(quantized_layers(again.module)) == LINEAR
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(again.module.eval()(ids).logits, model.module(ids).logits)
    with pytest.raises(UserError, match="and no plugin applies adapters"):
        load(tmp_path / "ready", plugins=["hf"])


@pytest.mark.parametrize(
    "section", [{"kind": "int8", "double_quant": False}, {"kind": "nf4", "outlier_threshold": 3.0}, {"kind": "nf5"}]
)
def test_settings_without_effect_are_refused(section: dict, load: Load) -> None:
    with pytest.raises((ConfigError, ValidationError), match=r"no effect|nf4"):
        load(**section)


def test_the_library_is_the_one_that_was_tested() -> None:
    assert bitsandbytes.__version__ >= "0.48"
