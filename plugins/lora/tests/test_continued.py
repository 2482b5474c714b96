"""Training an adapter further: same function, own shape, trained again; experts, tied embeddings, biases in exports."""

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
from pegbox.errors import PegboxError, UserError
from pegbox.testing.tiny import tiny_model
from pegbox.types import ExportRequest, Model
from pegbox_lora.config import LoraConfig
from tiny_mixtures import EXPERTS, mixture
from torch import nn

Adapt = Callable[..., tuple[Context, Model]]
IDS = torch.arange(24).reshape(2, 12)
KINDS = [
    {"r": 4, "alpha": 6, "targets": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
    {"r": 4, "use_dora": True, "use_rslora": True},
    {"r": 4, "targets": ["q_proj"], "modules_to_save": ["lm_head"], "tokens": [3, 5]},
    {"r": 4, "targets": ["q_proj"], "bias": "all"},
    {"r": 4, "init": "pissa"},
]


def fresh() -> Model:
    return replace(tiny_model(attention_bias=True), name="tiny")


def logits(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module.eval()(IDS).logits


def exported(adapt: Adapt, model: Model, folder: Path, **settings: object) -> Model:
    ctx, adapted = adapt(model, **settings)
    folder.mkdir()
    ctx.call(hooks.export_model, ctx, adapted, ExportRequest(folder=folder, format="peft"))
    return adapted


@pytest.mark.parametrize("settings", KINDS)
def test_an_adapter_goes_on_where_it_was(settings: dict, adapt: Adapt, tmp_path: Path) -> None:
    first = exported(adapt, fresh(), tmp_path / "first", **settings)
    ctx, again = adapt(fresh(), moved=False, adapter=str(tmp_path / "first"))
    exact = {"rtol": 1e-4, "atol": 1e-4} if "init" in settings else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(logits(again.module), logits(first.module), **exact)
    trained = {name for name, p in again.module.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in first.module.named_parameters() if p.requires_grad}
    (tmp_path / "second").mkdir()
    ctx.call(hooks.export_model, ctx, again, ExportRequest(folder=tmp_path / "second", format="peft"))
    reopened = peft.PeftModel.from_pretrained(fresh().module, tmp_path / "second")
    torch.testing.assert_close(logits(reopened), logits(again.module), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "gpt-oss"])
def test_adapters_of_experts_reopen_and_go_on(kind: str, adapt: Adapt, tmp_path: Path) -> None:
    ids = IDS % 64
    settings = {"targets": ["q_proj"], "parameters": EXPERTS, "r": 2}
    first = exported(adapt, replace(fresh(), module=mixture(kind)), tmp_path / "first", **settings)
    expected = first.module.eval()(ids).logits
    reopened = peft.PeftModel.from_pretrained(mixture(kind), tmp_path / "first").eval()
    torch.testing.assert_close(reopened(ids).logits, expected, rtol=0, atol=0)
    _, again = adapt(replace(fresh(), module=mixture(kind)), moved=False, adapter=str(tmp_path / "first"))
    torch.testing.assert_close(again.module.eval()(ids).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": ["q_proj"], "tokens": [3, 7]},
        {"targets": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_a_tied_head_follows_the_embeddings(settings: dict, adapt: Adapt, tmp_path: Path) -> None:
    model = exported(adapt, tiny_model(tie_word_embeddings=True), tmp_path / "run", **settings)
    wrapped = peft.PeftModel.from_pretrained(tiny_model(tie_word_embeddings=True).module, tmp_path / "run")
    torch.testing.assert_close(logits(wrapped), logits(model.module), rtol=0, atol=0)
    torch.testing.assert_close(logits(wrapped.merge_and_unload()), logits(model.module), rtol=1e-4, atol=1e-4)


def test_the_dropout_may_change(adapt: Adapt, tmp_path: Path) -> None:
    exported(adapt, fresh(), tmp_path / "first", r=4, targets=["q_proj"])
    _, again = adapt(fresh(), adapter=str(tmp_path / "first"), dropout=0.2, r=4, targets=["q_proj"])
    assert again.module.model.layers[0].self_attn.q_proj.lora_dropout["default"].p == 0.2


def test_the_config_that_a_run_writes_goes_on_too(adapt: Adapt, tmp_path: Path) -> None:
    exported(adapt, fresh(), tmp_path / "first", r=4, targets=["q_proj"])
    ctx, _ = adapt(fresh(), adapter=str(tmp_path / "first"))
    written = json.loads(ctx.section(LoraConfig).model_dump_json())
    _, again = adapt(fresh(), **written)
    assert again.module.peft_config["default"].r == 4


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"r": 16}, r"lora\.r is 16, but the adapter .* has 4"),
        ({"alpha": 3}, r"lora\.alpha is 3\.0, but the adapter .* has 32"),
        ({"targets": ["k_proj"]}, r"lora\.targets is \('k_proj',\), but the adapter"),
        ({"use_dora": True}, r"lora\.use_dora is True"),
        ({"rank_pattern": {"q_proj": 2}}, r"lora\.rank_pattern is"),
        ({"init": "pissa"}, r"lora\.init is set, but the adapter .* brings its own"),
        ({"tokens": [3]}, r"lora\.tokens is set"),
    ],
)
def test_settings_that_disagree_with_the_adapter_are_errors(
    settings: dict, says: str, adapt: Adapt, tmp_path: Path
) -> None:
    exported(adapt, fresh(), tmp_path / "first", r=4, targets=["q_proj"])
    with pytest.raises(PegboxError, match=says):
        adapt(fresh(), adapter=str(tmp_path / "first"), **settings)


def test_what_is_no_adapter_is_refused(adapt: Adapt, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no adapter_config\.json"):
        adapt(fresh(), adapter=str(tmp_path / "nothing"))
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError) as raised:
        adapt(fresh(), adapter=str(tmp_path))
    assert raised.value.why == "A run exports its adapter when training ends."
    peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="IA3 adapter"):
        adapt(fresh(), adapter=str(tmp_path))
    peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="fits a changed base only"):
        adapt(fresh(), adapter=str(tmp_path))
    peft.LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [0, 1]]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="repeats layers of its base"):
        adapt(fresh(), adapter=str(tmp_path))


def test_an_adapter_of_another_model_is_named(adapt: Adapt, tmp_path: Path) -> None:
    exported(adapt, tiny_model(hidden_size=32, num_attention_heads=4), tmp_path / "first", r=4, targets=["q_proj"])
    with pytest.raises(UserError, match=r"does not fit tiny: .*size mismatch"):
        adapt(fresh(), adapter=str(tmp_path / "first"))
    exported(adapt, tiny_model(num_hidden_layers=3), tmp_path / "deeper", r=4, targets=["q_proj"])
    with pytest.raises(UserError, match=r"does not fit tiny: model\.layers\.2.* on one side only"):
        adapt(fresh(), adapter=str(tmp_path / "deeper"))


def test_tokens_are_named_by_text_or_id(adapt: Adapt) -> None:
    _, model = adapt(tiny_model(), targets=["q_proj"], tokens=["word", 9])
    assert model.module.peft_config["default"].trainable_token_indices == {"model.embed_tokens": [1, 9]}
    with pytest.raises(UserError, match="holds 'wrod', which is"):
        adapt(tiny_model(), targets=["q_proj"], tokens=["wrod"])
    with pytest.raises(UserError, match=r"holds 900, but model\.embed_tokens of tiny has 260 rows"):
        adapt(tiny_model(), targets=["q_proj"], tokens=[900])
    with pytest.raises(UserError, match="the token 1 twice"):
        adapt(tiny_model(), targets=["q_proj"], tokens=["word", 1])


def test_rows_of_other_tokens_stay_and_a_half_precision_base_has_float32_rows(adapt: Adapt) -> None:
    model = tiny_model()
    model.module.to(torch.bfloat16)
    before = model.module.get_input_embeddings().weight.clone()
    _, adapted = adapt(model, targets=["q_proj"], tokens=[3])
    merged = adapted.module.get_input_embeddings().weight
    changed = (merged != before).any(1).nonzero().flatten().tolist()
    assert changed == [3]
    rows = next(p for name, p in adapted.module.named_parameters() if "trainable_tokens_delta" in name)
    assert rows.dtype == torch.float32
