"""Experts by the operation: losses, gradients and trained weights are those of transformers' own experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mixtures import KINDS, assembled, composed, folder, gradients, loaded, logps
from pegbox import hooks
from pegbox.errors import ConfigError, PatchError, PluginError
from pegbox.patches import PatchLog
from pegbox.testing.tiny import tiny_batches, tiny_model
from pegbox.types import ModelRequest, ModulePatch
from pegbox_scattermoe.activation import Activation, activation_of
from pegbox_scattermoe.config import ScattermoeConfig
from pegbox_scattermoe.seam import layer_of, patches
from torch import nn


@pytest.mark.parametrize("kind", KINDS)
def test_full_fine_tuning_is_that_of_transformers(kind: str) -> None:
    batch = tiny_batches(rows=4)[0]
    plain, _ = assembled(kind, [])
    ours, log = assembled(kind, ["scattermoe"])
    torch.testing.assert_close(logps(ours, batch), logps(plain, batch), rtol=1e-5, atol=1e-5)
    expected, got = gradients(plain, batch), gradients(ours, batch)
    assert got.keys() == expected.keys()
    assert any("experts" in name for name in got)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    log.verify()
    assert {entry["slot"] for entry in log.summary()} == {"experts"}
    assert {entry["kind"] for entry in log.summary()} == {"seam"}


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe"])
def test_several_steps_end_at_the_weights_of_transformers(kind: str) -> None:
    ends = []
    for plugins in ([], ["scattermoe"]):
        model, _ = assembled(kind, plugins)
        optimizer = torch.optim.SGD(model.module.parameters(), lr=0.05)
        losses = []
        for batch in tiny_batches(rows=4) * 3:
            loss = -logps(model, batch).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        ends.append((torch.stack(losses), dict(model.module.named_parameters())))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)
    assert ends[0][0][-1] < ends[0][0][0]


def test_autocast_computes_experts_in_its_data_type_and_gives_back_the_inputs() -> None:
    batch = tiny_batches(rows=4)[0]
    exact = logps(assembled("qwen3_moe", [])[0], batch)
    ours, _ = assembled("qwen3_moe", ["scattermoe"])
    kinds: set[torch.dtype] = set()
    for module in ours.module.modules():
        if layer_of(module) is not None:
            module.register_forward_hook(lambda _, args, out: kinds.update((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = logps(ours, batch)
        plain = logps(assembled("qwen3_moe", [])[0], batch)
    error = (got - exact).abs().mean()
    assert 0 < error <= 2 * (plain - exact).abs().mean() + 1e-3
    assert kinds <= {torch.float32, torch.bfloat16}
    assert all(gradient.dtype == torch.float32 for gradient in gradients(ours, batch).values())


def test_a_plan_without_weights_finds_the_experts() -> None:
    ctx = composed("gpt_oss", ["scattermoe"])
    model = ctx.call(hooks.load_model, ctx, ModelRequest(name=folder("gpt_oss"), format="transformers", meta=True))
    log = PatchLog()
    log.apply(model, ctx.each(hooks.patch_modules, ctx, model, "base"))
    assert [len(entry["modules"]) for entry in log.summary()] == [2]


def test_another_plugin_on_the_same_experts_is_an_error() -> None:
    model, log = assembled("mixtral", ["scattermoe"])
    other = ModulePatch(slot="experts", target="mlp.experts", replace=lambda old: lambda *a: old(*a), reason="other")
    with pytest.raises(PatchError, match="scattermoe"):
        log.apply(model, [("other", [other])])


def test_without_calls_the_patch_is_found_idle() -> None:
    _, log = assembled("mixtral", ["scattermoe"])
    with pytest.raises(PatchError, match="experts"):
        log.verify()


def test_the_config_of_the_model_stays_as_it_was() -> None:
    plain = loaded("gpt_oss").module.config.to_dict()
    model, log = assembled("gpt_oss", ["scattermoe"])
    assert model.module.config.to_dict() == plain
    before = model.module.config._experts_implementation
    assert before == loaded("gpt_oss").module.config._experts_implementation
    log.undo()
    assert not any(layer_of(module) for module in model.module.modules())


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(PluginError, match="has no experts"):
        patches(ScattermoeConfig(), tiny_model())


class Gated:
    """An experts class as `activation_of` sees it."""

    def __init__(self, gate: Any, **attributes: Any) -> None:
        self._apply_gate = gate
        vars(self).update(attributes)


def halves(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = gate_up.chunk(2, dim=-1)
    return first, second


REFUSED = {
    "gelu": Gated(lambda x: nn.functional.gelu(halves(x)[0]) * halves(x)[1]),
    "clamped": Gated(lambda x: nn.functional.silu(halves(x)[0].clamp(max=7)) * halves(x)[1].clamp(-7, 7), limit=7.0),
    "swapped": Gated(lambda x: nn.functional.silu(halves(x)[1]) * halves(x)[0]),
    "no gate": SimpleNamespace(has_gate=False),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_activation_that_the_operation_lacks_is_refused(kind: str) -> None:
    with pytest.raises(PluginError, match=r"Gated|SimpleNamespace"):
        activation_of(REFUSED[kind], "model.layers.0.mlp.experts")  # type: ignore[arg-type]


def test_activations_are_found_by_their_numbers() -> None:
    def clamped(x: torch.Tensor) -> torch.Tensor:
        gate, up = halves(x)
        gate, up = gate.clamp(max=5.0), up.clamp(-5.0, 5.0)
        return (up + 1) * gate * torch.sigmoid(1.5 * gate)

    found = activation_of(Gated(clamped, alpha=1.5, limit=5.0), "")  # type: ignore[arg-type]
    assert found == Activation("gpt_oss", interleaved=False, alpha=1.5, limit=5.0)
    experts = loaded("gpt_oss").module.get_submodule("model.layers.0.mlp.experts")
    assert activation_of(experts, "") == Activation("gpt_oss", interleaved=True)


def test_weights_in_other_kinds_of_numbers_are_refused() -> None:
    model = loaded("qwen3_moe")
    experts: Any = model.module.get_submodule("model.layers.1.mlp.experts")
    experts.down_proj = nn.Parameter(experts.down_proj.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(PluginError, match=r"layers\.1\.mlp\.experts\.down_proj.*Qwen3MoeExperts.*float8"):
        patches(ScattermoeConfig(), model)


def test_a_choice_of_kernel_is_refused_where_none_runs() -> None:
    with pytest.raises(ConfigError, match=r"scattermoe\.base is triton, and the run is on a CPU"):
        assembled("mixtral", ["scattermoe"], scattermoe={"base": "triton"})
    assembled("mixtral", ["scattermoe"], scattermoe={"save": "none"})
