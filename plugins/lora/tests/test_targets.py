"""Which modules are adapted: the language model of a multimodal model alone, stacked experts, layers, own ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from pegbox.context import Context
from pegbox.errors import UserError
from pegbox.testing.tiny import tiny_model
from pegbox.types import Model
from pegbox_lora.adapter import adapted_names
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

Adapt = Callable[..., tuple[Context, Model]]
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
TOWER, PROJECTOR = "model.vision_tower", "model.multi_modal_projector"


def multimodal() -> Model:
    """A Llava whose tower has layers named like those of its language model."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    text = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, **heads)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=60)
    return replace(tiny_model(), module=LlavaForConditionalGeneration(config), name="tiny-llava")


def adapted(model: Model) -> set[str]:
    return adapted_names(model.module)[0]


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "v_proj"], r".*\.(q|v)_proj", ["language_model.layers.0.mlp.up_proj"]]
)
def test_towers_and_projectors_are_not_hit_unless_named(targets: str | Sequence[str], adapt: Adapt) -> None:
    names = adapted(adapt(multimodal(), targets=targets)[1])
    assert names
    assert all(name.startswith("model.language_model.") for name in names)


def test_all_linear_reaches_every_linear_layer_of_the_language_model(adapt: Adapt) -> None:
    model = multimodal()
    decoder = model.module.get_decoder()
    linear = {f"model.language_model.{name}" for name, part in decoder.named_modules() if isinstance(part, nn.Linear)}
    assert adapted(adapt(model)[1]) == linear


@pytest.mark.parametrize(
    ("targets", "part"),
    [
        (r"model\.vision_tower\..*\.(q|v)_proj", TOWER),
        (["multi_modal_projector.linear_1"], PROJECTOR),
        (["q_proj", "multi_modal_projector.linear_2"], PROJECTOR),
    ],
)
def test_a_part_that_is_named_is_adapted(targets: str | Sequence[str], part: str, adapt: Adapt) -> None:
    names = adapted(adapt(multimodal(), targets=targets)[1])
    assert any(name.startswith(part) for name in names)
    if "q_proj" in targets:
        assert not any(name.startswith(TOWER) for name in names)


@pytest.mark.parametrize("targets", [["fc1"], r".*\.out_proj"])
def test_targets_only_in_an_unnamed_part_are_an_error(targets: str | Sequence[str], adapt: Adapt) -> None:
    with pytest.raises(UserError, match=r"only outside the language model .*: in model\.vision_tower"):
        adapt(multimodal(), targets=targets)


def test_layers_of_a_language_model_are_not_those_of_the_tower(adapt: Adapt) -> None:
    names = adapted(adapt(multimodal(), layers=[1])[1])
    assert len(names) == 7
    assert all(name.startswith("model.language_model.layers.1.") for name in names)


def test_layers_can_be_counted_in_a_named_list(adapt: Adapt) -> None:
    _, model = adapt(tiny_model(), targets=["q_proj"], layers=[1], layers_pattern=["layers"])
    assert adapted(model) == {"model.layers.1.self_attn.q_proj"}


def test_modules_have_their_own_rank_and_alpha(adapt: Adapt) -> None:
    patterns = {"rank_pattern": {r"layers\.1\..*q_proj": 2, "q_proj": 3}, "alpha_pattern": {"v_proj": 5}}
    _, model = adapt(tiny_model(), targets=["q_proj", "v_proj"], r=4, alpha=8, **patterns)
    layers = [layer.self_attn for layer in model.module.model.layers]
    assert [layer.q_proj.r["default"] for layer in layers] == [3, 2]
    assert [layer.q_proj.scaling["default"] for layer in layers] == [8 / 3, 4]
    assert [layer.v_proj.scaling["default"] for layer in layers] == [5 / 4, 5 / 4]


def test_an_expression_excludes(adapt: Adapt) -> None:
    names = adapted(adapt(tiny_model(), exclude=r".*\.layers\.0\..*|.*\.mlp\..*")[1])
    assert names == {f"model.layers.1.self_attn.{name}" for name in ATTENTION}


def half_dense() -> Model:
    """A mixture of experts whose first layer is dense, with layers named as experts were in older checkpoints."""
    sizes = {"hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = Qwen3MoeConfig(num_hidden_layers=3, num_experts=4, mlp_only_layers=[0], **sizes, **heads)
    return replace(tiny_model(), module=Qwen3MoeForCausalLM(config), name="tiny-moe")


@pytest.mark.parametrize(
    ("targets", "instead"),
    [
        ("all-linear", "[k_proj, o_proj, q_proj, v_proj], and name stacked experts in lora.parameters"),
        (["q_proj", "up_proj", "gate_proj"], "[q_proj]"),
        (r".*\.(down_proj|q_proj)", "[q_proj]"),
    ],
)
def test_what_peft_would_adapt_instead_is_an_error(targets: str | Sequence[str], instead: str, adapt: Adapt) -> None:
    with pytest.raises(UserError, match=r"differently for tiny-moe: it left out model\.layers\.\*\.mlp\.") as raised:
        adapt(half_dense(), targets=targets)
    assert f"Set lora.targets to {instead}" in raised.value.next


def test_layers_hold_for_stacked_experts_too(adapt: Adapt) -> None:
    settings = {"targets": ["q_proj"], "parameters": ["experts.gate_up_proj"], "layers": [1]}
    _, model = adapt(half_dense(), **settings)
    modules, parameters = adapted_names(model.module)
    assert modules == {"model.layers.1.self_attn.q_proj"}
    assert parameters == {"model.layers.1.mlp.experts.gate_up_proj"}


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["lm_head"]])
def test_an_update_of_a_shared_weight_is_an_error(targets: Sequence[str], adapt: Adapt) -> None:
    with pytest.raises(UserError, match="the head and the input embeddings are one weight"):
        adapt(tiny_model(tie_word_embeddings=True), targets=targets)


def test_modules_to_save_are_found_by_whole_names_only(adapt: Adapt) -> None:
    _, model = adapt(tiny_model(), targets=["q_proj"], modules_to_save=["norm"])
    saved = {name for name, p in model.module.named_parameters() if p.requires_grad and ".modules_to_save." in name}
    assert saved == {"model.norm.modules_to_save.default.weight"}
