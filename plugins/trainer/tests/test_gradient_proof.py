"""What is trained receives a gradient, and nothing else does: PEFT adapters and plain models, broken on purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from pegbox.errors import ConfigError, RunError
from pegbox.events import Event, GradientsReady, RunStarted, Stepped
from pegbox.hooks import hookimpl
from pegbox.types import Model
from tiny_llama import compute
from tiny_runs import run
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

Change = Callable[[nn.Module], object]
SAVED = {"r": 2, "target_modules": ["q_proj", "up_proj"]}


class Adapter:
    """Owns `apply_adapters`: PEFT's adapter, and then something that goes wrong."""

    def __init__(self, change: Change = lambda _: None, **settings: Any) -> None:
        self.change, self.settings = change, {**SAVED, **settings}

    @hookimpl
    def apply_adapters(self, model: Model) -> Model:
        peft.inject_adapter_in_model(peft.LoraConfig(**self.settings), model.module)
        self.change(model.module)
        return model


class At:
    """Changes the model when an event of a kind comes for the first time."""

    def __init__(self, kind: type, change: Change) -> None:
        self.kind, self.change, self.done = kind, change, False

    @hookimpl
    def on_event(self, event: Event) -> None:
        if isinstance(event, self.kind) and not self.done:
            self.done = True
            self.change(event.job.model.module if isinstance(event, RunStarted) else event.model.module)


class Changed:
    """Wraps `load_model`: the model, changed."""

    def __init__(self, change: Callable[[Model], Model]) -> None:
        self.change = change

    @hookimpl(wrapper=True)
    def load_model(self) -> Any:
        model = yield
        return self.change(model)


def detached(*names: str) -> Change:
    """The outputs of these modules no longer hang on their inputs and parameters."""

    def change(module: nn.Module) -> None:
        for name in names:
            module.get_submodule(name).register_forward_hook(lambda _module, _inputs, output: output.detach())

    return change


def adapted(config: Any, adapter: object, *others: tuple[str, object], **keys: Any) -> Any:
    names = ("adapter", *(name for name, _ in others))
    instances = {"adapter": adapter, **dict(others)}
    keys = {"max_steps": 6, **keys}
    return run(config(plugins=list(names), **keys), **instances)


@pytest.fixture
def start(config: Any) -> Callable[..., Any]:
    """Runs an adapter: `start(adapter, (name, plugin), max_steps=4)`."""
    return lambda adapter, *others, **keys: adapted(config, adapter, *others, **keys)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init_lora_weights": "gaussian"}])
@pytest.mark.parametrize("adamw", [{}, {"schedule": "constant_with_warmup", "warmup_steps": 3}])
def test_a_sound_adapter_trains(settings: dict, adamw: dict, start: Any) -> None:
    assert start(Adapter(**settings), adamw=adamw).step == 6


def test_a_detached_adapter_stops_the_run_and_is_named(start: Any) -> None:
    name = "model.layers.1.self_attn.q_proj"
    with pytest.raises(RunError, match="2 tensors of the adapter received no gradient") as raised:
        start(Adapter(detached(f"{name}.lora_A.default", f"{name}.lora_B.default")))
    assert "model.layers.*.self_attn.q_proj.lora_A.default.weight, model.layers.*." in raised.value.what


def test_many_are_named_in_groups_with_their_count(start: Any) -> None:
    names = [
        f"model.layers.{layer}.{part}.lora_{matrix}.default"
        for layer in (0, 1)
        for part in ("self_attn.q_proj", "mlp.up_proj")
        for matrix in "AB"
    ]
    with pytest.raises(RunError, match=r"8 tensors .*q_proj\.lora_A\.default\.weight \(2\).* and 1 more") as raised:
        start(Adapter(detached(*names, "model.layers.1")), ("sft_keeps_a_graph", At(RunStarted, _anchor)))
    assert len(raised.value.what) < 400


def _anchor(module: nn.Module) -> None:
    """Something that is trained besides, so that a backward is possible."""
    module.lm_head.register_forward_hook(lambda _m, _i, output: output + 0 * _weight(module).sum())


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.get_submodule("model.layers.0.self_attn.q_proj.lora_A.default").weight
    return weight.detach().requires_grad_()


def test_an_adapter_whose_gradient_stays_zero_is_named(start: Any) -> None:
    def cut(module: nn.Module) -> None:
        part = module.get_submodule("model.layers.0.mlp.up_proj.lora_B.default")
        part.register_forward_hook(lambda _module, _inputs, output: 0 * output)

    with pytest.raises(RunError, match=r"2 tensors .* model\.layers\.\*\.mlp\.up_proj\.lora_A"):
        start(Adapter(cut))


def test_a_base_parameter_unfrozen_during_the_run_is_named(start: Any) -> None:
    unfreeze = At(RunStarted, lambda module: module.model.norm.weight.requires_grad_(True))
    with pytest.raises(RunError, match=r"model\.norm\.weight received a gradient, but no optimizer steps it"):
        start(Adapter(), ("unfreeze", unfreeze))


def test_the_proof_can_be_left_out_or_told_what_may_stay(start: Any) -> None:
    broken = detached(
        "model.layers.1.self_attn.q_proj.lora_A.default", "model.layers.1.self_attn.q_proj.lora_B.default"
    )
    assert start(Adapter(broken), gradient_proof={"steps": 0}).step == 6
    assert start(Adapter(broken), output="allowed", gradient_proof={"allow": [r"layers\.1\..*q_proj"]}).step == 6


def test_a_short_run_is_not_asked_for_what_it_cannot_show(start: Any) -> None:
    assert start(Adapter(), max_steps=1).step == 1


def test_the_device_is_read_where_the_loop_waits_for_it(start: Any) -> None:
    seen = []

    class Count:
        @hookimpl
        def on_event(self, event: Event) -> None:
            if isinstance(event, Stepped):
                seen.append(event.step)

    names = ("model.layers.1.self_attn.q_proj.lora_A.default", "model.layers.1.self_attn.q_proj.lora_B.default")
    with pytest.raises(RunError, match="received no gradient"):
        start(Adapter(detached(*names)), ("count", Count()), max_steps=20, log_every=8)
    assert seen == list(range(1, 9))


def test_nothing_is_looked_at_after_the_first_steps(start: Any) -> None:
    late = At(Stepped, lambda _: None)
    reads = []

    class Count:
        @hookimpl
        def on_event(self, event: Event) -> None:
            if isinstance(event, GradientsReady) and event.step > 4:
                reads.append(event.step)
                # A gradient where none may be: in the first steps this would stop the run.
                weight = event.model.module.model.norm.weight
                weight.grad = torch.zeros_like(weight)

    assert start(Adapter(), ("late", late), ("count", Count()), max_steps=7).step == 7
    assert reads == [5, 6, 7]


def test_a_part_that_takes_no_part_stops_full_fine_tuning(config: Any) -> None:
    def add(model: Model) -> Model:
        model.module.model.spare = nn.Linear(4, 4)
        return model

    keys = {"plugins": ["spare"], "max_steps": 4}
    with pytest.raises(RunError, match=r"2 trained parameters .*: model\.spare\.weight, model\.spare\.bias"):
        run(config(**keys), spare=Changed(add))
    allowed = config("allowed", gradient_proof={"allow": [r"\.spare\."]}, **keys)
    assert run(allowed, spare=Changed(add)).step == 4


class Experts(nn.Module):
    """Experts that are modules of their own, of which one is used."""

    def __init__(self, used: int | None) -> None:
        super().__init__()
        self.used, self.experts = used, nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self.used is None else self.experts[self.used](hidden)


def test_experts_that_were_passed_over_are_no_alarm(config: Any) -> None:
    def routed(used: int | None) -> Changed:
        def change(model: Model) -> Model:
            model.module.model.norm = nn.Sequential(model.module.model.norm, Experts(used))
            return model

        return Changed(change)

    keys = {"plugins": ["routed"], "max_steps": 4}
    assert run(config(**keys), routed=routed(2)).step == 4
    with pytest.raises(RunError, match="8 trained parameters received no gradient"):
        run(config("none", **keys), routed=routed(None))


def test_stacked_experts_are_no_alarm(start: Any) -> None:
    def mixture(model: Model) -> Model:
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 8}
        sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 128}
        return replace(model, module=MixtralForCausalLM(MixtralConfig(**sizes, **heads)), compute=compute)

    adapter = Adapter(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    assert start(adapter, ("mixture", Changed(mixture))).step == 6


def test_rows_of_tokens_that_do_not_occur_are_no_alarm(start: Any) -> None:
    assert start(Adapter(trainable_token_indices=[0])).step == 6


def test_an_expression_that_is_none_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match=r"allow '\(' is no regular expression"):
        run(config(gradient_proof={"allow": ["("]}))
