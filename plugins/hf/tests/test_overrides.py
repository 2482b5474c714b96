"""Fields of the model's own config that a run changes, and rotary scaling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pegbox import hooks
from pegbox.context import Context
from pegbox.errors import ConfigError
from pegbox.plan import plan_model
from pegbox.types import ModelRequest
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

Compose = Callable[..., Context]
YARN = {"rope_type": "yarn", "factor": 4.0}


def load(ctx: Context, role: str = "policy", name: str | None = None, meta: bool = False) -> PreTrainedModel:
    request = ModelRequest(name=name or ctx.config.run.model.name, format="transformers", role=role, meta=meta)
    return ctx.call(hooks.load_model, ctx, request).module


def test_fields_of_the_config_are_changed_in_the_model_and_in_what_it_saves(
    folder: Path, tmp_path: Path, context: Compose
) -> None:
    for meta in (True, False):
        module = load(context(folder, hf={"config_overrides": {"attention_dropout": 0.25}}), meta=meta)
        assert module.model.layers[0].self_attn.attention_dropout == 0.25
    module.save_pretrained(tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").attention_dropout == 0.25


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_scaled_positions_are_those_of_transformers(key: str, folder: Path, context: Compose) -> None:
    hf = {"rope_scaling": YARN} if key == "rope_scaling" else {"config_overrides": {key: YARN}}
    ours = load(context(folder, hf=hf))
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters = {**YARN, "rope_theta": config.rope_parameters["rope_theta"]}
    config.rope_parameters["original_max_position_embeddings"] = 128
    theirs = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    ids = torch.arange(3, 90)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
        plain = load(context(folder))(ids).logits
    assert not torch.allclose(ours(ids).logits, plain, atol=1e-3)


def test_the_length_of_pretraining_is_the_one_before_the_change(folder: Path, context: Compose) -> None:
    hf = {"rope_scaling": YARN, "config_overrides": {"max_position_embeddings": 512}}
    config = load(context(folder, hf=hf)).config
    assert config.max_position_embeddings == 512
    assert config.rope_parameters["original_max_position_embeddings"] == 128


def test_the_base_of_the_rotation_stays_unless_it_is_given(
    tiny: Callable[..., PreTrainedModel], tmp_path: Path, context: Compose
) -> None:
    tiny("Llama", rope_parameters={"rope_type": "default", "rope_theta": 12345.0}).save_pretrained(tmp_path / "m")
    scaled = load(context(tmp_path / "m", hf={"rope_scaling": {"type": "linear", "factor": 2.0}})).config
    assert scaled.rope_parameters == {"rope_type": "linear", "rope_theta": 12345.0, "factor": 2.0}


def test_models_with_one_scaling_for_each_kind_of_layer_take_it_for_each(
    tiny: Callable[..., PreTrainedModel], tmp_path: Path, context: Compose
) -> None:
    tiny("Gemma3Text").save_pretrained(tmp_path / "m")
    before = AutoConfig.from_pretrained(tmp_path / "m").rope_parameters
    after = load(context(tmp_path / "m", hf={"rope_scaling": {"rope_type": "linear", "factor": 2.0}})).config
    for kind, values in after.rope_parameters.items():
        assert values == {"rope_type": "linear", "factor": 2.0, "rope_theta": before[kind]["rope_theta"]}


def test_other_models_of_the_run_stay_as_they_are(folder: Path, tmp_path: Path, context: Compose) -> None:
    (tmp_path / "teacher").symlink_to(folder)
    ctx = context(folder, hf={"config_overrides": {"attention_dropout": 0.25}, "rope_scaling": YARN})
    teacher = load(ctx, "teacher", str(tmp_path / "teacher"))
    assert (teacher.config.attention_dropout, teacher.config.rope_parameters["rope_type"]) == (0.0, "default")
    assert load(ctx, "reference").config.rope_parameters["rope_type"] == "yarn"


@pytest.mark.parametrize(
    ("hf", "says"),
    [
        ({"config_overrides": {"atention_dropout": 0.1}}, "Did you mean 'attention_dropout'"),
        ({"config_overrides": {"_attn_implementation": "eager"}}, "no field '_attn_implementation'"),
        ({"config_overrides": {"model_type": "qwen3"}}, "no field 'model_type'"),
        ({"config_overrides": {"dtype": "float32"}}, "Use model.dtype"),
        ({"config_overrides": {"vocab_size": 9}}, r"Use hf\.new_tokens"),
        ({"config_overrides": {"rope_scaling": YARN}, "rope_scaling": YARN}, "are scaled twice"),
        ({"rope_scaling": {"rope_type": "yarm", "factor": 2.0}}, "Did you mean 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear", "factr": 2.0}}, "does not fit"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "does not fit"),
        ({"config_overrides": {"hidden_size": 64}}, "does not load"),
    ],
)
def test_what_the_model_has_no_place_for_is_refused(hf: dict, says: str, folder: Path, context: Compose) -> None:
    with pytest.raises(Exception, match=says) as raised:
        load(context(folder, hf=hf))
    assert raised.value.next


def test_a_model_without_rotary_positions_cannot_be_scaled(
    tiny: Callable[..., PreTrainedModel], tmp_path: Path, context: Compose
) -> None:
    tiny("GPT2", n_embd=32, n_layer=2, n_head=4).save_pretrained(tmp_path / "m")
    with pytest.raises(ConfigError, match="has no rotary positions"):
        load(context(tmp_path / "m", hf={"rope_scaling": YARN}))


def test_a_plan_shows_the_changed_shape(folder: Path, context: Compose) -> None:
    plain = plan_model(context(folder)).model["parameters"]
    fewer = plan_model(context(folder, hf={"config_overrides": {"num_hidden_layers": 1}})).model["parameters"]
    assert fewer < plain
