"""Factors taken out of the base: PEFT's own, an unchanged function at the start, an export that fits the base."""

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
from pegbox.errors import RunError, UserError
from pegbox.testing.tiny import tiny_model
from pegbox.types import ExportRequest, Model
from pegbox_lora.initialization import STATE
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

Adapt = Callable[..., tuple[Context, Model]]
IDS = torch.arange(24).reshape(2, 12)
INITS = ["pissa", "pissa_niter_8", "olora"]
KINDS = [
    {"r": 4, "alpha": 6},
    {"r": 4, "alpha": 6, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    {"r": 4, "alpha": 6, "use_dora": True},
]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_factors_and_the_rest_of_the_base_are_those_of_peft(init: str, adapt: Adapt) -> None:
    _, ours = adapt(tiny_model(), moved=False, init=init, r=4, alpha=6)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=init, target_modules="all-linear")
    theirs = dict(peft.get_peft_model(tiny_model().module, config).get_base_model().named_parameters())
    for name, tensor in ours.module.named_parameters():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("settings", KINDS)
def test_the_function_at_the_start_is_that_of_the_base(init: str, settings: dict, adapt: Adapt) -> None:
    expected = tiny_model().module.eval()(IDS).logits
    _, model = adapt(tiny_model(), moved=False, init=init, **settings)
    torch.testing.assert_close(model.module.eval()(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("settings", KINDS)
def test_the_export_fits_the_published_base(
    init: str, settings: dict, adapt: Adapt, base: Path, tmp_path: Path
) -> None:
    ctx, model = adapt(replace(tiny_model(), base=str(base)), init=init, **settings)
    folder = tmp_path / "run"
    folder.mkdir()
    ctx.call(hooks.export_model, ctx, model, ExportRequest(folder=folder, format="peft"))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"]) == (True, 8)
    reopened = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(reopened(IDS).logits, model.module.eval()(IDS).logits, rtol=1e-4, atol=1e-4)


def test_factors_of_a_half_precision_base_stay_in_float32(adapt: Adapt) -> None:
    model = tiny_model()
    model.module.to(torch.bfloat16)
    weight = model.module.model.layers[0].self_attn.q_proj.weight.detach().float().clone()
    _, adapted = adapt(model, moved=False, init="pissa", r=4, alpha=4)
    layer = adapted.module.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (a.dtype, b.dtype, layer.base_layer.weight.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    back = layer.base_layer.weight.float() + b @ a
    rounded = (weight - b @ a).abs().max() * 2**-8
    assert (back - weight).abs().max() <= rounded


def test_a_checkpoint_brings_its_first_factors_back(adapt: Adapt) -> None:
    ctx, _ = adapt(tiny_model(), init="pissa", r=4)
    saved = ctx.states[STATE].state_dict()
    flipped = {name: [-a, -b] for name, (a, b) in saved.items()}
    ctx.states[STATE].load_state_dict(flipped)
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(ctx.states[STATE][name][0], flipped[name][0])


def test_first_factors_of_another_base_are_refused(adapt: Adapt) -> None:
    ctx, _ = adapt(tiny_model(), init="pissa", r=4)
    other, _ = adapt(tiny_model(seed=1), init="pissa", r=4)
    with pytest.raises(RunError, match="began with other factors than in the checkpoint"):
        ctx.states[STATE].load_state_dict(other.states[STATE].state_dict())


def test_more_directions_than_a_matrix_has_are_an_error(adapt: Adapt) -> None:
    with pytest.raises(UserError, match=r"rank 40, but model\.layers\.0\.self_attn\.k_proj is 32 x 64"):
        adapt(tiny_model(), init="pissa", r=40)


def test_an_embedding_has_no_factors_to_take(adapt: Adapt) -> None:
    with pytest.raises(UserError, match=r"embed_tokens is an embedding"):
        adapt(tiny_model(), init="olora", targets=["embed_tokens"])


def transposed() -> Model:
    """A GPT-2, whose layers keep their weights transposed."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0)
    return replace(tiny_model(), module=GPT2LMHeadModel(config), name="tiny-gpt2", traits=frozenset())


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_transposed_layers_are_known_as_such(init: str, adapt: Adapt, tmp_path: Path) -> None:
    ctx, model = adapt(transposed(), init=init, r=4)
    folder = tmp_path / "run"
    folder.mkdir()
    ctx.call(hooks.export_model, ctx, model, ExportRequest(folder=folder, format="peft"))
    assert json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    reopened = peft.PeftModel.from_pretrained(transposed().module, folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(reopened(IDS).logits, model.module.eval()(IDS).logits, rtol=1e-4, atol=1e-4)


def test_transposed_layers_have_no_olora(adapt: Adapt) -> None:
    with pytest.raises(UserError, match="keeps its weight transposed"):
        adapt(transposed(), init="olora", r=4)
