"""The adapter in the model: the same function as PEFT's own, on a frozen base; and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from pegbox import hooks
from pegbox.context import Context
from pegbox.errors import ConfigError, UserError
from pegbox.plan import compose
from pegbox.testing.tiny import tiny_batches, tiny_model
from pegbox.types import Model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

Adapt = Callable[..., tuple[Context, Model]]
IDS = torch.arange(24).reshape(2, 12)
PROJECTIONS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def by_hand(model: Model, settings: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """PEFT's own wrapped model with the same adapter weights."""
    wrapped = peft.get_peft_model(model.module, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    own = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
    missing = wrapped.load_state_dict(own, strict=False).unexpected_keys
    assert missing == []
    return wrapped.eval()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"r": 4, "alpha": 8}, {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
        (
            {"r": 4, "alpha": 8, "use_rslora": True, "targets": ["q_proj", "v_proj"]},
            {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
        ),
        (
            {"r": 2, "alpha": 1.5, "use_dora": True, "targets": r".*layers\.1\..*_proj"},
            {"r": 2, "lora_alpha": 1.5, "use_dora": True, "target_modules": r".*layers\.1\..*_proj"},
        ),
        (
            {"r": 4, "alpha": 8, "layers": [1]},
            {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, "layers_to_transform": [1]},
        ),
        (
            {"r": 4, "alpha": 8, "exclude": ["mlp.up_proj"], "modules_to_save": ["lm_head"]},
            {
                "r": 4,
                "lora_alpha": 8,
                "target_modules": "all-linear",
                "exclude_modules": ["mlp.up_proj"],
                "modules_to_save": ["lm_head"],
            },
        ),
    ],
)
def test_outputs_and_gradients_equal_those_of_peft(ours: dict, theirs: dict, adapt: Adapt) -> None:
    _, adapted = adapt(tiny_model(), **ours)
    trained = {name: p for name, p in adapted.module.named_parameters() if p.requires_grad}
    wrapped = by_hand(tiny_model(), theirs, {name: p.detach() for name, p in trained.items()})
    adapted.module.eval()
    torch.testing.assert_close(adapted.module(IDS).logits, wrapped(IDS).logits, rtol=0, atol=0)
    adapted.module(IDS).logits.square().sum().backward()
    wrapped(IDS).logits.square().sum().backward()
    expected = {name.removeprefix("base_model.model."): p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert set(trained) == set(expected)
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0, atol=0, msg=name)


def test_a_new_adapter_changes_nothing_yet(adapt: Adapt) -> None:
    expected = tiny_model().module(IDS).logits
    _, adapted = adapt(tiny_model(), moved=False)
    torch.testing.assert_close(adapted.module(IDS).logits, expected, rtol=0, atol=0)
    assert adapted.adapter == "peft"


def test_the_base_keeps_its_names_its_values_and_is_frozen(adapt: Adapt) -> None:
    before = dict(tiny_model().module.state_dict())
    _, adapted = adapt(tiny_model())
    frozen = {n.replace(".base_layer", ""): p for n, p in adapted.module.named_parameters() if not p.requires_grad}
    assert set(frozen) == set(before)
    assert all(torch.equal(parameter, before[name]) for name, parameter in frozen.items())
    assert {name for name, _ in tiny_model().module.named_modules()} <= {n for n, _ in adapted.module.named_modules()}


def test_adapters_begin_the_same_whatever_else_was_random(adapt: Adapt) -> None:
    _, first = adapt(tiny_model(), moved=False)
    torch.manual_seed(123)
    _, second = adapt(tiny_model(), moved=False)
    for (name, one), other in zip(first.module.named_parameters(), second.module.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_adding_the_adapter_does_not_shift_other_randomness(adapt: Adapt) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    model = tiny_model()
    torch.manual_seed(3)
    adapt(model)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head", "embed_tokens"]}])
def test_on_a_half_precision_base_the_adapter_is_float32_and_runs(settings: dict, adapt: Adapt) -> None:
    model = tiny_model()
    model.module.to(torch.bfloat16)
    _, adapted = adapt(model, **settings)
    trained = {p.dtype for p in adapted.module.parameters() if p.requires_grad}
    frozen = {p.dtype for p in adapted.module.parameters() if not p.requires_grad}
    assert (trained, frozen) == ({torch.float32}, {torch.bfloat16})
    outputs = adapted.compute(adapted.module, tiny_batches()[0], frozenset({"logps"}))
    outputs.logps_N.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.module.parameters() if p.requires_grad)


def test_the_adapters_dtype_can_be_chosen(adapt: Adapt) -> None:
    model = tiny_model()
    model.module.to(torch.bfloat16)
    _, adapted = adapt(model, dtype="bfloat16")
    assert {p.dtype for p in adapted.module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"init": "pissa"},
        {"tokens": ["word", 5]},
        {"targets": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_it_works_without_weights(settings: dict, adapt: Adapt) -> None:
    model = tiny_model()
    model.module.to("meta")
    _, adapted = adapt(model, moved=False, **settings)
    trained = sum(p.numel() for p in adapted.module.parameters() if p.requires_grad)
    real = sum(p.numel() for p in adapt(tiny_model(), **settings)[1].module.parameters() if p.requires_grad)
    assert trained == real > 0
    assert {p.device.type for p in adapted.module.parameters()} == {"meta"}


def test_adapters_reach_conv1d_layers_and_leave_the_head_alone(adapt: Adapt) -> None:
    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    _, adapted = adapt(replace(tiny_model(), module=module))
    adapted_layers = {name.split(".lora_")[0] for name, p in adapted.module.named_parameters() if p.requires_grad}
    block = "transformer.h.0"
    assert adapted_layers == {f"{block}.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}


def test_stacked_experts_are_adapted(adapt: Adapt) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        num_local_experts=4,
    )
    model = replace(tiny_model(), module=MixtralForCausalLM(config))
    expected = model.module(IDS).logits
    _, adapted = adapt(model, targets=[], parameters=["experts.gate_up_proj", "experts.down_proj"])
    assert all("experts" in name for name, p in adapted.module.named_parameters() if p.requires_grad)
    logits = adapted.module(IDS).logits
    assert not torch.allclose(logits, expected)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.module.parameters() if p.requires_grad)


class Plain(nn.Module):
    """A network that is none of transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)


def test_any_torch_module_can_be_adapted(adapt: Adapt) -> None:
    _, adapted = adapt(replace(tiny_model(), module=Plain()), targets=["one"])
    assert [name for name, p in adapted.module.named_parameters() if p.requires_grad] == [
        "one.lora_A.default.weight",
        "one.lora_B.default.weight",
    ]


def test_biases_are_trained_if_asked_for(adapt: Adapt) -> None:
    model = tiny_model(attention_bias=True)
    _, adapted = adapt(model, bias="lora_only", targets=["q_proj"])
    trained = {n for n, p in adapted.module.named_parameters() if p.requires_grad and n.endswith("bias")}
    assert trained == {f"model.layers.{layer}.self_attn.q_proj.base_layer.bias" for layer in (0, 1)}


@pytest.mark.parametrize(
    ("settings", "what", "hint"),
    [
        ({"targets": ["q_porj"]}, "'q_porj' matches nothing", "Did you mean 'q_proj'"),
        ({"targets": "all-liner"}, "'all-liner' matches nothing", "Did you mean 'all-linear'"),
        ({"targets": ["q_proj", "c_attn"]}, "'c_attn' matches nothing", ""),
        ({"targets": ["zzz"]}, "'zzz' matches nothing", "It would have no effect."),
        ({"targets": r".*\.attention\..*"}, "matches nothing", ""),
        ({"exclude": ["v_porj"]}, r"lora\.exclude: 'v_porj' matches nothing", "'v_proj'"),
        ({"modules_to_save": ["head"]}, r"lora\.modules_to_save: 'head' matches nothing", "'lm_head'"),
        ({"parameters": ["experts.up"]}, r"lora\.parameters: 'experts\.up' matches nothing", ""),
        ({"targets": ["input_layernorm"]}, "PEFT cannot adapt tiny", ""),
        ({"layers": [2]}, r"lora\.layers holds 2, but tiny has layers 0 to 1", ""),
        ({"targets": ["q_proj"], "exclude": ["q_proj"]}, "leave none of them", ""),
        ({"exclude": r".*\.v_porj"}, r"lora\.exclude: '\.\*\\\.v_porj' matches nothing", "'v_proj'"),
        ({"rank_pattern": {"v_porj": 4}}, r"lora\.rank_pattern: 'v_porj' matches nothing", "'v_proj'"),
        ({"alpha_pattern": {"k_proj": 4}, "targets": ["q_proj"]}, r"alpha_pattern: 'k_proj' matches nothing", ""),
        ({"tokens": [1], "token_modules": ["wte"]}, r"lora\.token_modules: 'wte' matches nothing", ""),
        ({"layers": [1], "layers_pattern": ["blocks"]}, r"layers_pattern: 'blocks' matches nothing", ""),
    ],
)
def test_targets_that_match_nothing_are_errors(settings: dict, what: str, hint: str, adapt: Adapt) -> None:
    with pytest.raises(UserError, match=what) as raised:
        adapt(tiny_model(), **settings)
    assert hint in raised.value.why


def test_the_error_lists_the_linear_layers_that_exist(adapt: Adapt) -> None:
    with pytest.raises(UserError) as raised:
        adapt(tiny_model(), targets=["query_key_value"])
    for name in ("model.layers.*.self_attn.q_proj", "model.layers.*.mlp.down_proj"):
        assert name in raised.value.next
    assert "lm_head" not in raised.value.next


def test_trained_biases_need_a_float32_base(adapt: Adapt) -> None:
    model = tiny_model(attention_bias=True)
    model.module.to(torch.bfloat16)
    with pytest.raises(UserError, match=r"lora\.bias is 'all', but the base is in bfloat16"):
        adapt(model, bias="all")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"r": 0}, "r"),
        ({"dropout": 1.0}, "dropout"),
        ({"targets": []}, "nothing would be adapted"),
        ({"targets": "(q_proj"}, "is no regular expression"),
        ({"targets": ".*q_proj", "layers": [0]}, "cannot be combined with a regular expression"),
        ({"layers": [-1]}, "counted from 0"),
        ({"parameters": ["experts.down_proj"], "dropout": 0.1}, "take no dropout"),
        ({"parameters": ["experts.down_proj"], "use_dora": True}, "no DoRA"),
        ({"init": "orthogonal", "r": 3}, "set it to 4"),
        ({"init": "pisa"}, "Did you mean 'pissa'"),
        ({"init": "pissa_niter_0"}, "no initialization"),
        ({"init": "eva", "rank_pattern": {"q_proj": 2}}, "eva takes one rank"),
        ({"init_rows": 8}, "init_rows is set, but init is 'default'"),
        ({"init": "loftq"}, "init: loftq replaces the base"),
        ({"init": "mica"}, "init: mica freezes"),
        ({"init": "pissa", "parameters": ["experts.down_proj"]}, "no init but default and gaussian"),
        ({"init": "orthogonal", "rank_pattern": {"q_proj": 5}}, "set it to 6"),
        ({"rank_pattern": {"(q": 5}}, "rank_pattern '\\(q' is no regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"exclude": "(q_proj"}, "exclude '\\(q_proj' is no regular expression"),
        ({"layers_pattern": ["layers"]}, "layers is not"),
        ({"token_modules": ["lm_head"]}, "set tokens"),
        ({"tokens": [3, 3]}, "names a token twice"),
        ({"tokens": [3], "token_modules": ["lm_head"], "modules_to_save": ["lm_head"]}, "all of its rows are trained"),
        ({"lr_ratio": 0.0}, "lr_ratio"),
        ({"targets": ["lm_head"], "modules_to_save": ["lm_head"]}, "remove it from one of them"),
        ({"rnak": 8}, "rnak"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_loaded(settings: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        compose({"model": {"name": "x"}, "plugins": ["lora"], "lora": settings})


def test_only_the_policy_is_adapted_by_the_hook(adapt: Adapt) -> None:
    ctx, adapted = adapt(tiny_model())
    assert ctx.owned(hooks.apply_adapters)
    assert list(adapted.module.peft_config) == ["default"]
