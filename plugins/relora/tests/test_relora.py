"""Restarts against a plain reference, exact resume, the export of the whole model, and what cannot work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pegbox.errors import ConfigError, PegboxError, RunError, UserError
from pegbox.events import Event, RunStarted, Signal, Stepped
from pegbox.hooks import hookimpl
from pegbox.testing.tiny import TinyExamples, collate, compute, tiny_model
from pegbox.types import Model, Optimization
from pegbox_relora.config import ReloraConfig
from pegbox_relora.schedule import JaggedSchedule, factor
from tiny_restarts import ROWS, texts
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

Train = Callable[..., Any]
IDS = torch.arange(24).reshape(2, 12)
RATE, STEPS = 1e-2, 12


def reference(ctx: Any, settings: dict[str, Any], lora: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The same training in plain torch over PEFT's layers: weights of the merged model by name."""
    torch.manual_seed(ctx.rng("lora/init").seed)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], **lora)
    module = peft.get_peft_model(tiny_model().module, config).get_base_model()
    layers = [layer for layer in module.modules() if isinstance(layer, peft.tuners.lora.Linear)]
    factors = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=RATE, weight_decay=0.1)
    every, warmup, anneal = settings["every"], settings["warmup_steps"], settings.get("anneal_steps", 0)
    rows = TinyExamples(texts())
    for step in range(STEPS):
        since = step % every
        rate = RATE * (STEPS - step) / STEPS
        if step >= every and since < warmup:
            rate *= (since + 1) / warmup
        if every - since <= anneal:
            rate *= (every - since) / (anneal + 1)
        optimizer.param_groups[0]["lr"] = rate
        batch = collate([rows[(4 * step + row) % ROWS] for row in range(4)])
        logps_N = compute(module, batch, frozenset({"logps"})).logps_N
        optimizer.zero_grad()
        (-logps_N.sum() / len(logps_N)).backward()
        optimizer.step()
        if (step + 1) % every == 0:
            restart(ctx, step + 1, layers, optimizer, settings)
    with torch.no_grad():
        for layer in layers:
            add(layer)
    return {name.replace(".base_layer", ""): p for name, p in module.named_parameters() if ".lora_" not in name}


def add(layer: Any) -> None:
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    layer.base_layer.weight += layer.scaling["default"] * (b @ a)


@torch.no_grad()
def restart(ctx: Any, step: int, layers: list[Any], optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> None:
    for layer in layers:
        add(layer)
    torch.manual_seed(ctx.rng("relora/restart", step).seed)
    for layer in layers:
        nn.init.kaiming_uniform_(layer.lora_A["default"].weight, a=5**0.5)
        layer.lora_B["default"].weight.zero_()
    ratio, source = settings.get("prune_ratio", 0.99), torch.Generator()
    source.manual_seed(ctx.rng("relora/prune", step).seed)
    for layer in layers:
        for p in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            if settings.get("prune") == "reset":
                del optimizer.state[p]
                continue
            gone = optimizer.state[p]["exp_avg"].flatten().abs().argsort()[: int(ratio * p.numel())]
            if settings.get("prune") == "random":
                gone = (torch.rand(p.numel(), generator=source) < ratio).nonzero().flatten()
            for state in ("exp_avg", "exp_avg_sq"):
                optimizer.state[p][state].view(-1)[gone] = 0


@pytest.mark.parametrize(
    ("settings", "lora"),
    [
        ({"every": 4, "warmup_steps": 2}, {}),
        ({"every": 4, "warmup_steps": 2, "prune_ratio": 0.5}, {"use_rslora": True}),
        ({"every": 5, "warmup_steps": 2, "anneal_steps": 2, "prune": "random", "prune_ratio": 0.7}, {}),
        ({"every": 3, "warmup_steps": 0, "prune": "reset"}, {}),
    ],
)
def test_weights_are_those_of_a_plain_reference(settings: dict, lora: dict, train: Train) -> None:
    ctx, model = train(settings, STEPS, lora=lora)
    expected = reference(ctx, settings, lora)
    found = dict(model.module.named_parameters())
    assert found.keys() == expected.keys()
    moved = 0.0
    for name, tensor in tiny_model().module.named_parameters():
        torch.testing.assert_close(found[name], expected[name].detach(), rtol=1e-5, atol=1e-5)
        moved = max(moved, float((found[name] - tensor).abs().max()))
    assert moved > 1e-2


class StopAt:
    """Asks the run to stop after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    @hookimpl
    def on_event(self, event: Event) -> Signal | None:
        return Signal.STOP if isinstance(event, Stepped) and event.step == self.step else None


@pytest.mark.parametrize(("step", "prune"), [(2, "magnitude"), (4, "random"), (7, "magnitude"), (7, "reset")])
def test_a_resumed_run_ends_with_the_same_bits(step: int, prune: str, train: Train) -> None:
    _, whole = train({"prune": prune}, output="whole", lora={"dropout": 0.1})
    train({"prune": prune}, instances={"stop": StopAt(step)}, lora={"dropout": 0.1})
    _, resumed = train({"prune": prune}, resume="auto", lora={"dropout": 0.1}, instances={"stop": StopAt(99)})
    for (name, one), other in zip(whole.module.named_parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_the_function_stays_what_it_was_at_a_restart(train: Train) -> None:
    seen = {}

    class Around:
        def __init__(self, name: str) -> None:
            self.name = name

        @hookimpl
        def on_event(self, event: Event) -> None:
            if isinstance(event, Stepped) and event.step == 4:
                with torch.no_grad():
                    seen[self.name] = event.model.module(IDS).logits
                    seen[f"{self.name} factor"] = (
                        event.model.module.model.layers[0].mlp.up_proj.lora_B["default"].weight
                    )

    around = {"before": Around("before"), "after": Around("after")}
    train(plugins=["tiny", "lora", "before", "relora", "after", "sft", "adamw", "trainer"], instances=around)
    torch.testing.assert_close(seen["after"], seen["before"], rtol=1e-5, atol=1e-5)
    assert not torch.equal(seen["after"], tiny_model().module(IDS).logits)


def test_the_whole_model_is_exported_and_has_learned_more_than_the_rank(train: Train, tmp_path: Path) -> None:
    _, model = train(steps=12)
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert "model.safetensors" in files
    assert "adapter_config.json" not in files
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad():
        assert torch.equal(reopened(IDS).logits, model.module.eval()(IDS).logits)
    name = "model.layers.0.mlp.up_proj.weight"
    learned = dict(model.module.named_parameters())[name] - dict(tiny_model().module.named_parameters())[name]
    assert int(torch.linalg.matrix_rank(learned.detach().double(), rtol=1e-5)) == 6


def mixture() -> Model:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 260}
    return replace(tiny_model(), module=MixtralForCausalLM(MixtralConfig(**sizes, **heads)))


@pytest.mark.parametrize(
    ("lora", "make"),
    [
        ({"targets": ["q_proj"], "modules_to_save": ["norm"], "tokens": [97, 98]}, tiny_model),
        ({"targets": ["q_proj"], "bias": "lora_only"}, partial(tiny_model, attention_bias=True)),
        ({"targets": ["q_proj", "embed_tokens"]}, tiny_model),
        ({"targets": [], "parameters": ["experts.gate_up_proj", "experts.down_proj"]}, mixture),
    ],
)
def test_everything_that_was_trained_is_in_the_export(lora: dict, make: Callable, train: Train, tmp_path: Path) -> None:
    last = {}

    class Last:
        @hookimpl
        def on_event(self, event: Event) -> None:
            if isinstance(event, Stepped):
                with torch.no_grad():
                    last["logits"] = event.model.module.eval()(IDS + 85).logits
                event.model.module.train()

    train(steps=10, lora=lora, make=make, instances={"last": Last()})
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad():
        torch.testing.assert_close(reopened(IDS + 85).logits, last["logits"], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(make().module.eval()(IDS + 85).logits, last["logits"], atol=1e-3)


def test_the_learning_rate_is_jagged_around_any_schedule() -> None:
    settings = ReloraConfig(every=5, warmup_steps=2, anneal_steps=1)
    assert [factor(settings, step) for step in range(12)] == [1, 1, 1, 1, 0.5, 0.5, 1, 1, 1, 0.5, 0.5, 1]
    for make in (
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 0.9**count),
        lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12),
    ):
        plain_optimizer, optimizer = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0) for _ in range(2))
        plain, jagged = make(plain_optimizer), JaggedSchedule(make(optimizer), optimizer, settings)
        for step in range(12):
            expected = plain.get_last_lr()[0] * factor(settings, step)
            assert jagged.get_last_lr()[0] == pytest.approx(expected)
            assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
            plain_optimizer.step()
            optimizer.step()
            plain.step()
            jagged.step()


def test_a_rate_that_is_kept_in_a_tensor_stays_in_it() -> None:
    settings = ReloraConfig(every=4, warmup_steps=2)
    rate = torch.tensor(1.0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    jagged = JaggedSchedule(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), optimizer, settings)
    for step in range(10):
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.9**step * factor(settings, step))
        optimizer.step()
        jagged.step()


class Sharded:
    """Lets a base weight look like a part of one."""

    @hookimpl
    def on_event(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            event.job.model.module.model.layers[0].self_attn.q_proj.base_layer.weight.to_local = lambda: None


class ScheduleFree:
    """An optimizer with modes."""

    @hookimpl(wrapper=True)
    def build_optimizer(self) -> Any:
        made: Optimization = yield
        made.optimizer.eval = lambda: None
        return made


@pytest.mark.parametrize(
    ("keys", "error", "says"),
    [
        ({"lora": {"use_dora": True}}, UserError, "has a magnitude of its own"),
        ({"lora": {"init": "pissa"}}, UserError, "does not begin at zero"),
        ({"lora": {"init": "orthogonal"}}, UserError, "does not begin at zero"),
        ({"model": {"name": "tiny", "dtype": "bfloat16"}}, ConfigError, "merges into the base"),
        ({"steps": 4}, ConfigError, "every is 4, but the run has 4 steps"),
        ({"make": lambda: _half()}, UserError, "q_proj: it is in bfloat16"),
        ({"plugins": ["tiny", "relora", "sft", "adamw", "trainer"]}, PegboxError, "lora"),
        (
            {
                "plugins": ["tiny", "lora", "sharded", "relora", "sft", "adamw", "trainer"],
                "instances": {"sharded": Sharded()},
            },
            RunError,
            "is sharded over processes",
        ),
        (
            {
                "plugins": ["tiny", "lora", "free", "relora", "sft", "adamw", "trainer"],
                "instances": {"free": ScheduleFree()},
            },
            ConfigError,
            "which is schedule-free",
        ),
        (
            {
                "plugins": ["tiny", "lora", "relora", "sft", "optim", "trainer"],
                "optim": {"name": "adafactor", "schedule": "constant"},
            },
            RunError,
            "cannot prune the states of Adafactor",
        ),
    ],
)
def test_what_cannot_work_is_an_error(keys: dict, error: type[Exception], says: str, train: Train) -> None:
    with pytest.raises(error, match=says):
        train(**keys)


def _half() -> Model:
    model = tiny_model()
    model.module.to(torch.bfloat16)
    return model


def test_factored_states_can_be_begun_anew(train: Train) -> None:
    plugins = ["tiny", "lora", "relora", "sft", "optim", "trainer"]
    _, model = train({"prune": "reset"}, plugins=plugins, optim={"name": "adafactor", "schedule": "constant"})
    assert all(torch.isfinite(p).all() for p in model.module.parameters())


def test_no_adapter_plugin_is_an_error(train: Train) -> None:
    from pegbox.plan import compose
    from pegbox_relora.conditions import model_options

    ctx = compose({"model": {"name": "x"}, "plugins": ["relora"], "relora": {"every": 10, "warmup_steps": 1}})
    with pytest.raises(ConfigError, match="no plugin applies an adapter"):
        model_options(ctx)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"every": 10, "warmup_steps": 8, "anneal_steps": 2}, "leave no step of 10"),
        ({"every": 100, "prune": "reset", "prune_ratio": 0.5}, "prune_ratio would do nothing"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ReloraConfig(**settings)
