"""Groups, decay and schedules, against transformers' Trainer, torch, and the equations of the paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pegbox.errors import ConfigError, PluginError, UserError
from pegbox.merging import merge_groups
from pegbox.plan import compose
from pegbox.types import GroupOptions, Model
from pegbox_optim.adamw import build_adamw, build_schedule
from pegbox_optim.adamw_config import AdamwConfig
from pydantic import ValidationError
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer


def model_of(module: nn.Module) -> Model:
    def compute(*_: object) -> Any:
        raise AssertionError("an optimizer never runs the model")

    return Model(module=module, name="tiny", base="tiny", format="transformers", compute=compute)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, attention_bias=True, **sizes))


def optimizer_of(module: nn.Module, *options: GroupOptions, **settings: Any) -> torch.optim.AdamW:
    model = model_of(module)
    return build_adamw(AdamwConfig(**settings), model, merge_groups(model, [("test", options)] if options else []))


def decay_by_name(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}


def test_what_is_decayed_equals_transformers_trainer() -> None:
    module = tiny_llama()
    expected = set(Trainer.get_decay_parameter_names(None, module))  # type: ignore[arg-type]
    decays = decay_by_name(optimizer_of(module, weight_decay=0.1))
    assert {name for name, decay in decays.items() if decay == 0.1} == expected
    assert {name for name, decay in decays.items() if decay == 0.0} == set(decays) - expected
    assert set(decays) == {name for name, _ in module.named_parameters()}


def test_vectors_are_not_decayed_unless_the_config_says_so() -> None:
    module = nn.Module()
    module.magnitude = nn.Parameter(torch.ones(4))
    module.weight = nn.Parameter(torch.ones(4, 4))
    assert decay_by_name(optimizer_of(module, weight_decay=0.1)) == {"magnitude": 0.0, "weight": 0.1}
    decays = decay_by_name(optimizer_of(module, weight_decay=0.1, decay_all=True))
    assert decays == {"magnitude": 0.1, "weight": 0.1}


def test_options_by_name_reach_exactly_the_parameters_they_match() -> None:
    module = tiny_llama()
    optimizer = optimizer_of(
        module,
        GroupOptions(pattern=r"q_proj", learning_rate=1e-2, weight_decay=0.5),
        GroupOptions(pattern=r"lm_head", learning_rate_scale=10.0),
        learning_rate=1e-3,
        weight_decay=0.1,
    )
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    for name, decay in decay_by_name(optimizer).items():
        assert rates[name] == (1e-2 if "q_proj" in name else pytest.approx(1e-2) if "lm_head" in name else 1e-3)
        if "q_proj" in name:
            assert decay == 0.5


def test_an_absolute_and_a_relative_learning_rate_for_one_parameter_are_an_error() -> None:
    both = GroupOptions(pattern="weight", learning_rate=1.0, learning_rate_scale=2.0)
    with pytest.raises(PluginError, match="only one can hold"):
        optimizer_of(nn.Linear(2, 2, bias=False), both)


def test_frozen_parameters_are_left_out() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    assert set(decay_by_name(optimizer_of(module))) == {"1.weight", "1.bias"}


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(UserError, match="no trainable parameter"):
        optimizer_of(nn.Linear(2, 2).requires_grad_(False))


def test_a_step_follows_the_papers_equations() -> None:
    module = nn.Linear(3, 5, bias=False).double()
    start = module.weight.detach().clone()
    gradients = [torch.randn(5, 3, dtype=torch.float64) for _ in range(3)]
    optimizer = optimizer_of(module, learning_rate=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.01)
    assert optimizer.param_groups[0]["fused"] is True
    first, second, expected = torch.zeros_like(start), torch.zeros_like(start), start
    for t, gradient in enumerate(gradients, start=1):
        module.weight.grad = gradient.clone()
        optimizer.step()
        first, second = 0.8 * first + 0.2 * gradient, 0.95 * second + 0.05 * gradient**2
        step = (first / (1 - 0.8**t)) / ((second / (1 - 0.95**t)).sqrt() + 1e-6)
        expected = expected - 0.1 * step - 0.1 * 0.01 * expected
    torch.testing.assert_close(module.weight.detach(), expected)


def rates_of(total: int, **settings: Any) -> list[float]:
    config = AdamwConfig(learning_rate=1.0, **settings)
    module = nn.Linear(2, 2)
    optimizer = optimizer_of(module, learning_rate=1.0)
    schedule = build_schedule(config, optimizer, total)
    rates = []
    for _ in range(total):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


def test_linear_schedule_rises_over_the_warmup_and_falls_to_zero() -> None:
    expected = [step / 4 if step < 4 else (20 - step) / 16 for step in range(20)]
    assert rates_of(20, warmup_steps=4) == pytest.approx(expected)
    assert rates_of(20, warmup_ratio=0.16) == pytest.approx(expected), "a part of a step rounds up"


def test_cosine_schedule_follows_the_cosine() -> None:
    expected = [0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)]
    assert rates_of(10, schedule="cosine") == pytest.approx(expected)


def test_schedule_options_reach_the_schedule() -> None:
    lowest = min(rates_of(50, schedule="cosine_with_min_lr", schedule_options={"min_lr_rate": 0.25}))
    assert 0.25 <= lowest < 0.26


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule_options": {"wrong": 1}}, "unknown key 'wrong' in section 'adamw.schedule_options'"),
        ({"schedule": "cosine_with_min_lr"}, "the floor is one of them"),
        ({"schedule": "cosine", "schedule_options": {"num_cycles": -1}}, "greater than 0"),
    ],
)
def test_options_that_do_not_fit_the_schedule_are_an_error_of_the_plan(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose({"model": {"name": "tiny"}, "plugins": ["adamw"], "adamw": settings})


def test_a_warmup_longer_than_the_run_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"adamw\.warmup_steps is 11, but the run has 10 steps"):
        rates_of(10, warmup_steps=11)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "remove one of them"),
        ({"schedule": "constant", "warmup_steps": 5}, "set schedule to constant_with_warmup"),
        ({"schedule": "plateau"}, "Input should be"),
        ({"betas": (0.9, 1.0)}, "less than 1"),
        ({"learning_rate": 0.0}, "greater than 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AdamwConfig(**settings)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "warmup_stable_decay", "inverse_sqrt"])
def test_state_round_trips_bit_identically_without_unpickling_code(schedule: Any, tmp_path: Any) -> None:
    options = {"decay_steps": 3} if schedule == "warmup_stable_decay" else {}
    config = AdamwConfig(schedule=schedule, schedule_options=options, warmup_steps=2)

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        torch.manual_seed(1)
        module = nn.Linear(4, 4)
        optimizer = optimizer_of(module)
        return module, optimizer, build_schedule(config, optimizer, 10)

    def train(module: nn.Module, optimizer: Any, schedule: Any, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            module(torch.randn(3, 4)).square().sum().backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    whole = fresh()
    train(*whole, range(8))
    first = fresh()
    train(*first, range(4))
    torch.save([part.state_dict() for part in first], tmp_path / "state.pt")
    second = fresh()
    for part, state in zip(second, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*second, range(4, 8))
    assert torch.equal(whole[0].weight, second[0].weight)
    assert whole[2].get_last_lr() == second[2].get_last_lr()
