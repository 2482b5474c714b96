"""Patched models compute what they computed, adapters still act, and what is not known is left alone."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from pegbox import hooks
from pegbox.errors import ConfigError, PatchError, RunError
from pegbox.patches import PatchLog
from pegbox.types import ModulePatch
from torch import nn

ALL = {"rope": "auto"}
FOUND = {
    "llama": {"norm": 5, "mlp": 2, "rope": 2},
    "qwen3": {"norm": 9, "mlp": 2, "rope": 2},
    "gemma2": {"norm": 9, "mlp": 2, "rope": 2},
    "gemma3_text": {"norm": 13, "mlp": 2, "rope": 2},
    "phi3": {"norm": 5, "mlp": 2, "rope": 2},
    "cohere": {"mlp": 2, "rope": 2},
    "glm4": {"norm": 9, "mlp": 2, "rope": 2},
    "gpt_oss": {"norm": 5, "experts": 2, "rope": 2},
    "qwen3_moe": {"norm": 9, "experts": 2, "rope": 2},
    "qwen3_next": {"norm": 8, "mlp": 2, "experts": 2, "rope": 1},
}
"""Modules of each slot that are replaced in a model of two layers."""


def slots(log: PatchLog) -> dict[str, int]:
    return dict(Counter(applied.patch.slot for applied in log.applied))


@pytest.mark.parametrize("family", FOUND)
def test_loss_and_gradients_are_those_without_it(family: str, patched, network, outcome) -> None:
    model = network(family)
    loss, gradients = outcome(model)
    log = patched(model, **ALL)
    assert slots(log) == FOUND[family]
    with_it = outcome(model)
    log.verify()
    torch.testing.assert_close(with_it[0], loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(with_it[1], gradients, rtol=1e-4, atol=1e-6)
    log.undo()
    assert torch.equal(outcome(model)[0], loss)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_in_bfloat16_the_loss_is_that_without_it_to_its_precision(family: str, patched, network, outcome) -> None:
    model = network(family)
    exact = outcome(model)[0]
    model.module.to(torch.bfloat16)
    plain = outcome(model)[0]
    patched(model, **ALL)
    fused = outcome(model)[0]
    assert abs(float(fused - exact)) <= 2 * abs(float(plain - exact)) + 0.01


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_adapters_on_the_projections_of_a_patched_mlp_are_trained_the_same(
    family: str, patched, network, outcome
) -> None:
    peft = pytest.importorskip("peft")
    results = []
    for fused in (False, True):
        model = network(family)
        if fused:
            patched(model)
        names = ["gate_up_proj", "down_proj"] if family == "phi3" else ["gate_proj", "up_proj", "down_proj"]
        torch.manual_seed(0)
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False), model.module)
        results.append(outcome(model))
    assert any("lora_" in name for name in results[0][1])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_a_copy_of_a_patched_norm_has_a_weight_of_its_own(patched, network) -> None:
    """PEFT's modules_to_save trains a copy of a module; a forward that held the old one would train nothing."""
    model = network("llama")
    patched(model)
    norm = model.module.model.norm
    twin = copy.deepcopy(norm)
    with torch.no_grad():
        twin.weight.mul_(2)
    x = torch.randn(3, 32)
    torch.testing.assert_close(twin(x), 2 * norm(x))


def test_a_copy_of_an_attention_with_another_rope_is_bound_to_itself(patched, network) -> None:
    model = network("llama")
    patched(model, rope=True)
    attention = model.module.model.layers[0].self_attn
    assert copy.deepcopy(attention).forward.__self__ is not attention
    assert attention.forward.__self__ is attention


def test_other_models_and_the_library_keep_their_functions(patched, network) -> None:
    from transformers.models.llama import modeling_llama

    function, forward = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaAttention.forward
    patched(network("llama"), **ALL)
    assert modeling_llama.apply_rotary_pos_emb is function
    assert modeling_llama.LlamaAttention.forward is forward
    assert forward.__globals__["apply_rotary_pos_emb"] is function


def test_weights_are_found_under_the_names_they_had(patched, network) -> None:
    model = network("qwen3")
    before = {name: id(parameter) for name, parameter in model.module.named_parameters()}
    patched(model, **ALL)
    assert {name: id(parameter) for name, parameter in model.module.named_parameters()} == before


def test_a_model_without_weights_is_patched_the_same(patched, network) -> None:
    """`pegbox plan --model` builds it on the meta device."""
    model = network("qwen3")
    model.module.to("meta")
    assert slots(patched(model, **ALL)) == FOUND["qwen3"]


class Doubled(nn.Module):
    """A norm that is none of the known: it doubles its result."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class AnotherName(Doubled):
    """Llama's norm, under a name that says nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(
            x.dtype
        )


class Scaled(nn.Module):
    """A gated MLP that does more: it scales its result."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_what_computes_something_else_is_left_alone_and_named(
    patched, caplog: pytest.LogCaptureFixture, network, outcome
) -> None:
    model = network("llama")
    layers = model.module.model.layers
    layers[0].input_layernorm = Doubled(layers[0].input_layernorm)
    layers[1].input_layernorm = AnotherName(layers[1].input_layernorm)
    layers[0].mlp = Scaled(layers[0].mlp)
    loss = outcome(model)[0]
    with caplog.at_level(logging.WARNING, "pegbox"):
        log = patched(model)
    assert slots(log) == {"norm": 4, "mlp": 1}
    assert "fused.norm leaves alone: 1 Doubled, which computes something else" in caplog.text
    assert "fused.mlp leaves alone: 1 Scaled, which computes something else" in caplog.text
    torch.testing.assert_close(outcome(model)[0], loss)


def test_what_somebody_already_changed_is_left_alone(patched, caplog: pytest.LogCaptureFixture, network) -> None:
    model = network("llama")
    norm = model.module.model.norm
    norm.forward = lambda x: x
    model.module.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.WARNING, "pegbox"):
        log = patched(model)
    assert slots(log) == {"norm": 4, "mlp": 1}
    assert "1 LlamaRMSNorm, which has a forward or hooks of its own" in caplog.text


def test_experts_of_another_implementation_are_left_alone(patched, network) -> None:
    """It would not ask for the seam; the patch would never be called."""
    model = network("gpt_oss")
    model.module.config._experts_implementation = "other"
    assert "experts" not in slots(patched(model))


@pytest.mark.parametrize(
    ("family", "section", "message"),
    [
        ("gpt_oss", {"mlp": True}, "fused.mlp is true, but nothing of it is found in gpt_oss"),
        ("llama", {"experts": True}, "fused.experts is true, but nothing of it is found in llama"),
        ("cohere", {"mlp": False}, "fused finds nothing to do in cohere"),
        ("cohere", {"norm": True}, "fused.norm is true"),
    ],
)
def test_what_must_be_found_and_is_not_is_an_error(family: str, section: dict, message: str, patched, network) -> None:
    with pytest.raises(ConfigError, match=message):
        patched(network(family), **section)


def test_nothing_at_all_is_an_error(context) -> None:
    with pytest.raises(ConfigError, match="all off; nothing would be done"):
        context(norm=False, mlp=False, experts=False)


def test_a_kernel_that_is_wrong_on_the_runs_device_is_an_error(
    network, context, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pegbox_kernels.recognition import norms

    ctx = context()
    ctx.runtime = SimpleNamespace(device=torch.device("cuda", 0))
    right = norms.agrees
    monkeypatch.setattr(norms, "agrees", lambda *args, **more: len(args) < 3 and right(*args, **more))
    with pytest.raises(
        RunError, match=r"the kernel for .*norm \(rounded before the weight\) gives other numbers on cuda"
    ):
        ctx.each(hooks.patch_modules, ctx, network("llama"), "base")


def replaced(slot: str, target: str) -> ModulePatch:
    """What another plugin with kernels for the same slot declares."""

    def wrapped(module: nn.Module):
        original = module.forward
        return lambda *args, **kwargs: original(*args, **kwargs)

    return ModulePatch(slot=slot, target=target, replace=wrapped, reason="kernels of another plugin")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("slot", "target"), [("norm", "*.norm"), ("mlp", "layers.*.mlp"), ("rope", "*.self_attn")])
def test_two_plugins_on_one_slot_are_an_error_that_names_both(
    first: bool, slot: str, target: str, network, context
) -> None:
    model, ctx = network("llama"), context(**ALL)
    answers = [*ctx.each(hooks.patch_modules, ctx, model, "base"), ("liger", [replaced(slot, target)])]
    with pytest.raises(PatchError) as error:
        PatchLog().apply(model, answers if first else answers[::-1])
    assert f"two patches for the {slot} of" in error.value.what
    assert "'fused'" in error.value.what
    assert "'liger' (kernels of another plugin)" in error.value.what
    assert "switch the feature off in one of them" in error.value.next


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels run on a GPU")
@pytest.mark.parametrize("family", FOUND)
def test_on_a_gpu_loss_and_gradients_are_those_without_it(family: str, patched, network, outcome) -> None:
    model = network(family)
    model.module.to("cuda")
    with torch.device("cuda"):
        loss, gradients = outcome(model)
        patched(model, **ALL)
        with_it = outcome(model)
    torch.testing.assert_close(with_it[0], loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(with_it[1], gradients, rtol=1e-2, atol=1e-3)
