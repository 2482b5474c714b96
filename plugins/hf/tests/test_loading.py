"""Loading models for roles, in data types, on the meta device; and what is refused."""

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
from pegbox.errors import ConfigError, UserError
from pegbox.hooks import hookimpl
from pegbox.merging import merge_options
from pegbox.plan import compose
from pegbox.rows import Batch
from pegbox.types import Model, ModelOptions, ModelRequest
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

Compose = Callable[..., Context]
LOGPS = frozenset({"logps"})


class Adapters:
    """Owns apply_adapters, as a plugin that adds adapters does."""

    @hookimpl
    def apply_adapters(self, model: Model) -> Model:
        return model


def load(ctx: Context, **request: object) -> Model:
    asked = ModelRequest(name=ctx.config.run.model.name, format="transformers", **request)
    return ctx.call(hooks.load_model, ctx, asked)


def with_adapters(folder: Path, hf: dict[str, object] | None = None, **model: object) -> Context:
    config = {"model": {"name": str(folder), **model}, "plugins": ["hf", "adapters"], "hf": hf or {}}
    return compose(config, instances={"adapters": Adapters()})


def test_a_loaded_model_says_what_it_is(folder: Path, context: Compose) -> None:
    model = load(context(folder))
    assert (model.name, model.base, model.format, model.role) == (str(folder), str(folder), "transformers", "policy")
    assert model.adapter is None
    assert "causal" in model.traits


def test_a_policy_without_adapters_is_trained_in_float32(folder: Path, context: Compose) -> None:
    assert load(context(folder)).module.dtype == torch.float32
    assert load(context(folder, hf={"trainable_dtype": "bfloat16"})).module.dtype == torch.bfloat16


def test_dtypes_that_an_adapter_leaves_without_effect_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"hf\.trainable_dtype is bfloat16, and a plugin applies an adapter"):
        load(with_adapters(folder, {"trainable_dtype": "bfloat16"}))
    ctx = with_adapters(folder, {"export_dtype": "bfloat16"})
    with pytest.raises(ConfigError, match=r"hf\.export_dtype is bfloat16, but this run exports an adapter"):
        ctx.each(hooks.patch_modules, ctx, replace(load(ctx), adapter="peft"), "adapted")


def test_under_adapters_the_base_keeps_its_dtype(folder: Path) -> None:
    assert load(with_adapters(folder, dtype="bfloat16")).module.dtype == torch.bfloat16
    assert load(with_adapters(folder, dtype="float16")).module.dtype == torch.float16
    asked = ModelOptions(dtype="float32")
    assert load(with_adapters(folder), options=asked).module.dtype == torch.float32


def test_auto_is_the_checkpoints_dtype_where_it_is_fast(folder: Path) -> None:
    fast = torch.accelerator.is_available()
    assert load(with_adapters(folder)).module.dtype == (torch.bfloat16 if fast else torch.float32)


def test_second_models_are_frozen_and_keep_their_dtype(folder: Path, context: Compose) -> None:
    model = load(context(folder, model={"name": str(folder), "dtype": "bfloat16"}), role="reference")
    assert model.module.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.module.parameters())


def test_loading_in_float32_keeps_the_values(folder: Path, context: Compose, batch: Callable[..., Batch]) -> None:
    model, rows = load(context(folder)), batch()
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits_NV = own(input_ids=rows.input_ids_BT).logits.flatten(0, 1)[rows.trained_N]
    expected_N = logits_NV.log_softmax(-1).gather(-1, rows.targets_BT.flatten()[rows.trained_N][:, None]).squeeze(-1)
    torch.testing.assert_close(model.compute(model.module, rows, LOGPS).logps_N, expected_N)


def test_the_head_is_no_parameter_and_is_not_saved(folder: Path, context: Compose) -> None:
    model = load(context(folder))
    own = AutoModelForCausalLM.from_pretrained(folder)
    assert list(model.module.state_dict()) == list(own.state_dict())


def test_on_the_meta_device_no_weights_are_read(folder: Path, context: Compose) -> None:
    (folder / "model.safetensors").unlink()
    model = load(context(folder), meta=True)
    assert {p.device.type for p in model.module.parameters()} == {"meta"}
    assert model.module.dtype == torch.float32
    assert load(with_adapters(folder, dtype="bfloat16"), meta=True).module.dtype == torch.bfloat16
    assert "causal" in model.traits


@pytest.mark.parametrize("tied", [True, False])
def test_a_process_without_weights_has_the_same_network_and_head(
    tied: bool, tiny: Callable[..., PreTrainedModel], tmp_path: Path, context: Compose
) -> None:
    whole = tiny("Gemma2", final_logit_softcapping=3.0, tie_word_embeddings=tied)
    whole.save_pretrained(tmp_path / "m")
    full, empty = (load(context(tmp_path / "m"), options=ModelOptions(empty=flag)).module for flag in (None, True))
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert empty.token_head.rule == full.token_head.rule
    assert empty.token_head.rule.softcap == 3.0
    assert [(n, p.shape, p.dtype) for n, p in full.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in empty.named_parameters()
    ]
    assert (empty.get_output_embeddings().weight is empty.get_input_embeddings().weight) == tied


def test_the_attention_that_was_asked_for_is_used(folder: Path, context: Compose) -> None:
    assert load(context(folder)).module.config._attn_implementation == "sdpa"
    for meta in (False, True):
        model = load(context(folder), meta=meta, options=ModelOptions(attention="eager"))
        assert model.module.config._attn_implementation == "eager"


def test_an_attention_that_does_not_exist_is_refused(folder: Path, context: Compose) -> None:
    for meta in (False, True):
        with pytest.raises(UserError, match="Did you mean 'flash_attention_4'"):
            load(context(folder), meta=meta, options=ModelOptions(attention="flash_attention_9"))


def test_the_attention_of_the_config_is_asked_for_like_any_other(folder: Path, context: Compose) -> None:
    ctx = context(folder, hf={"attention": "eager"})
    assert merge_options(ctx.each(hooks.configure_model, ctx)) == ModelOptions(attention="eager")


def test_pickled_weights_are_refused(folder: Path, context: Compose) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="Only safetensors are loaded"):
        load(context(folder))


def test_missing_weights_are_refused(folder: Path, context: Compose) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 parameters: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(context(folder))


def test_broken_weights_are_an_error_without_a_trace(folder: Path, context: Compose) -> None:
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}{}{}")
    with pytest.raises(UserError, match="does not load"):
        load(context(folder))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "no_such_type", "architectures": ["X"]}, "does not know the model type 'no_such_type'"),
        ({"model_type": "vit"}, "is no causal language model"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.OwnModel"}},
            "runs its own Python code",
        ),
    ],
)
def test_models_that_cannot_be_opened_say_why(change: dict, says: str, folder: Path, context: Compose) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=says) as raised:
        load(context(folder))
    assert raised.value.next


def test_a_config_that_is_not_json_is_refused(folder: Path, context: Compose) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load(context(folder))


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_own_code_runs_only_if_the_config_names_the_model(folder: Path, context: Compose) -> None:
    config = json.loads((folder / "config.json").read_text())
    owner = {"auto_map": {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.Own"}, "model_type": "own"}
    (folder / "config.json").write_text(json.dumps({**config, **owner}))
    (folder / "code.py").write_text(OWN_CODE)
    with pytest.raises(UserError, match="runs its own Python code") as raised:
        load(context(folder, hf={"trust_remote_code": ["another/model"]}))
    assert f"trust_remote_code: [{folder}]" in raised.value.next
    model = load(context(folder, hf={"trust_remote_code": [str(folder)]}))
    assert type(model.module).__name__ == "Own"


def test_an_adapter_opens_for_reading_and_not_for_training(
    folder: Path, tmp_path: Path, context: Compose, batch: Callable[..., Batch], tokenizer: PreTrainedTokenizerFast
) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        use_dora=True,
        modules_to_save=["lm_head"],
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(base, config)
    with torch.no_grad():
        adapted.get_output_embeddings().weight.add_(0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    rows = batch()
    model = load(context(tmp_path / "adapter"), role="reference", options=ModelOptions(dtype="float32"))
    assert model.base == str(folder)
    logits_NV = adapted(input_ids=rows.input_ids_BT).logits.flatten(0, 1)[rows.trained_N]
    ours_NV = model.compute(model.module, rows, frozenset({"logits"})).logits_NV
    assert not any(p.requires_grad for p in model.module.parameters())
    torch.testing.assert_close(ours_NV, logits_NV, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="is a PEFT adapter, not a model"):
        load(context(tmp_path / "adapter"))


def test_what_cannot_be_kept_packed_is_refused(folder: Path, context: Compose) -> None:
    with pytest.raises(UserError, match="are to stay packed"):
        load(context(folder), options=ModelOptions(keep_packed=("experts",)))


def test_a_hub_name_without_connection_says_so(
    tmp_path: Path, context: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="no model 'some-owner/some-model'") as raised:
        load(context("some-owner/some-model"))
    assert "local folder or GGUF file" in raised.value.next


def test_a_hub_model_in_the_cache_opens_without_connection(
    folder: Path, tmp_path: Path, context: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--some-owner--some-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / "c0ffee")
    ctx = context("some-owner/some-model")
    assert ctx.call(hooks.load_processor, ctx).pad_id == 0
    assert load(ctx).base == "some-owner/some-model"


def test_transformers_stays_silent(folder: Path, context: Compose, capfd: pytest.CaptureFixture[str]) -> None:
    ctx = context(folder)
    capfd.readouterr()
    ctx.call(hooks.load_processor, ctx)
    load(ctx)
    assert capfd.readouterr() == ("", "")


def test_traits_come_from_fields_and_parameters(
    tiny: Callable[..., PreTrainedModel], tmp_path: Path, context: Compose
) -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    expected = {
        "Llama": ({}, {"causal"}),
        "Qwen2": ({"tie_word_embeddings": True}, {"causal", "tied_head"}),
        "Qwen3": ({}, {"causal", "qk_norm"}),
        "Mixtral": (experts, {"causal", "moe"}),
        "GptOss": (experts, {"causal", "moe", "sliding_window", "attention_sinks"}),
        "Gemma2": (
            {"tie_word_embeddings": True},
            {"causal", "tied_head", "sliding_window", "attention_softcap", "logit_softcap"},
        ),
        "Mistral": ({"sliding_window": 8}, {"causal", "sliding_window"}),
        "Phi": ({}, {"causal", "head_bias"}),
    }
    for family, (changes, traits) in expected.items():
        path = tmp_path / family
        tiny(family, **changes).save_pretrained(path)
        assert load(context(path)).traits == traits, family
        assert load(context(path), meta=True).traits == traits, family


def test_a_model_can_be_loaded_twice_in_one_run(folder: Path, context: Compose) -> None:
    ctx = context(folder)
    policy, reference = load(ctx), load(ctx, role="reference")
    assert replace(policy, role="reference", module=reference.module) == reference
