"""One training step of each kind of adapter against PEFT's own model in plain torch; and learning rates within it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from pegbox import hooks
from pegbox.context import Context
from pegbox.errors import PegboxError
from pegbox.merging import merge_groups
from pegbox.testing.tiny import tiny_model
from pegbox.types import Model
from tiny_mixtures import EXPERTS, mixture
from torch import nn

Adapt = Callable[..., tuple[Context, Model]]
IDS = torch.arange(2, 26).reshape(2, 12)
BOTH = {"q_proj", "v_proj"}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({"targets": sorted(BOTH)}, {"target_modules": BOTH}),
    "regex": ({"targets": r".*\.1\..*_proj"}, {"target_modules": r".*\.1\..*_proj"}),
    "rslora": ({"use_rslora": True}, {"use_rslora": True, "target_modules": "all-linear"}),
    "dora": ({"use_dora": True}, {"use_dora": True, "target_modules": "all-linear"}),
    "patterns": (
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.0\..*v_proj": 4}},
        {
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {r"layers\.0\..*v_proj": 4},
            "target_modules": "all-linear",
        },
    ),
    "saved": (
        {"targets": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "tokens": (
        {"targets": ["q_proj"], "tokens": [3, 7]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]},
    ),
    "both embeddings' tokens": (
        {"targets": ["q_proj"], "tokens": [3, 7], "token_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [3, 7]}},
    ),
    "bias": ({"targets": ["q_proj"], "bias": "lora_only"}, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "embedding": ({"targets": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}),
}


def after_one_step(network: nn.Module, rate: float = 0.05) -> dict[str, torch.Tensor]:
    """Trained parameters by their names in the bare network, after one step of SGD from moved factors."""
    bare = network.get_base_model() if isinstance(network, peft.PeftModel) else network
    trained = {name: p for name, p in bare.named_parameters() if p.requires_grad}
    source = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name in sorted(trained):
            trained[name].copy_(0.1 * torch.randn(trained[name].shape, generator=source) + 0.05)
    network(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD(trained.values(), lr=rate).step()
    return {name: p.detach().clone() for name, p in trained.items()}


def assert_same_step(ours: nn.Module, theirs: nn.Module) -> None:
    expected = after_one_step(theirs)
    found = after_one_step(ours)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_peft(kind: str, adapt: Adapt) -> None:
    own, theirs = KINDS[kind]
    _, model = adapt(tiny_model(attention_bias=True), moved=False, r=4, alpha=6, **own)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **theirs)
    assert_same_step(model.module, peft.get_peft_model(tiny_model(attention_bias=True).module, config))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "gpt-oss"])
def test_a_step_of_stacked_experts_is_that_of_peft(kind: str, adapt: Adapt) -> None:
    settings = {"targets": ["q_proj"], "parameters": EXPERTS, "rank_pattern": {"experts.down_proj": 2}}
    _, model = adapt(replace(tiny_model(), module=mixture(kind)), moved=False, r=4, alpha=6, **settings)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=EXPERTS, rank_pattern={"experts.down_proj": 2}
    )
    assert_same_step(model.module, peft.get_peft_model(mixture(kind), config))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"targets": ["q_proj", "embed_tokens"]}])
def test_learning_rates_are_those_of_lora_plus(settings: dict, adapt: Adapt) -> None:
    rate, embedding_rate, ratio = 1e-3, 1e-5, 16.0
    embeds = {"embedding_lr": embedding_rate} if "targets" in settings else {}
    ctx, model = adapt(tiny_model(), lr_ratio=ratio, **embeds, **settings)
    options = {"lr": rate, "loraplus_lr_ratio": ratio, "loraplus_lr_embedding": embedding_rate}
    optimizer = create_loraplus_optimizer(model.module, torch.optim.AdamW, **options)
    expected = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(model.module.named_parameters())
    found = {}
    for group in merge_groups(model, ctx.each(hooks.configure_groups, ctx, model)):
        scaled = rate * (group.options.learning_rate_scale or 1.0)
        found |= {id(parameters[name]): group.options.learning_rate or scaled for name in group.names}
    assert found == expected


def test_a_learning_rate_for_nothing_is_an_error(adapt: Adapt) -> None:
    ctx, model = adapt(tiny_model(), embedding_lr=1e-5)
    with pytest.raises(PegboxError, match=r"lora\.embedding_lr is set, but no adapter is on an embedding"):
        merge_groups(model, ctx.each(hooks.configure_groups, ctx, model))


def test_a_base_parameter_that_was_unfrozen_is_named_before_training(adapt: Adapt) -> None:
    ctx, model = adapt(tiny_model())
    model.module.model.norm.weight.requires_grad_(True)
    with pytest.raises(PegboxError, match=r"1 parameters of the base are still trained: model\.norm\.weight"):
        ctx.each(hooks.configure_groups, ctx, model)


def test_a_frozen_part_of_the_adapter_is_an_error(adapt: Adapt) -> None:
    ctx, model = adapt(tiny_model())
    model.module.model.layers[0].mlp.up_proj.lora_B["default"].weight.requires_grad_(False)
    with pytest.raises(PegboxError, match="left 28 parameters in tiny, of which 27 are trained"):
        ctx.each(hooks.configure_groups, ctx, model)
