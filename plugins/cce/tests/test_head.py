"""The fused head equals the plain one, says what it cannot serve, and never makes all logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pegbox import hooks
from pegbox.errors import ConfigError, PatchError
from pegbox.rows import Batch
from pegbox.testing.tiny import tiny_batches
from pegbox.types import Model, Need
from pegbox_cce import CcePlugin
from pegbox_cce.projection import call, linear_layers

Load = Callable[..., Model]
LITTLE = {"logits_gib": 1e-5}
"""Room for 8 rows of logits."""


def batch_of(trained: int | None = None) -> Batch:
    batch = tiny_batches(rows=6)[0]
    return batch if trained is None else replace(batch, trained_N=batch.trained_N[:trained])


def outcome(model: Model, batch: Batch, needs: frozenset[Need], weighted: bool = True) -> tuple[Any, dict[str, Any]]:
    outputs = model.compute(model.module, batch, needs)
    parts = [part for part in (outputs.logps_N, outputs.entropy_N) if part is not None]
    weights = torch.linspace(0.5, 1.5, len(parts[0]))
    sum((part * weights).sum() if weighted else part.sum() for part in parts).backward()
    gradients = {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}
    return [part.detach() for part in parts], gradients


@pytest.mark.parametrize("kind", ["plain", "tied", "scaled", "capped", "biased"])
@pytest.mark.parametrize(
    "needs", [{"logps"}, {"logps", "entropy"}, {"entropy"}], ids=lambda needs: "-".join(sorted(needs))
)
def test_values_and_gradients_equal_those_of_the_plain_head(kind: str, needs: Any, load: Load) -> None:
    expected = outcome(load(kind), batch_of(), frozenset(needs))
    for settings in ({}, LITTLE):
        got = outcome(load(kind, settings), batch_of(), frozenset(needs))
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-5)


def test_under_autocast_the_error_is_not_that_of_more_than_bf16(load: Load) -> None:
    """fp32 weights, bf16 products, as a run in bf16 trains all parameters."""
    needs: frozenset[Need] = frozenset({"logps", "entropy"})
    exact = outcome(load("tied"), batch_of(), needs)
    with torch.autocast("cpu", torch.bfloat16):
        plain, ours = (outcome(load("tied", settings), batch_of(), needs) for settings in (None, LITTLE))
    for index in (0, 1):
        assert (ours[0][index] - exact[0][index]).abs().max() <= 2 * (plain[0][index] - exact[0][index]).abs().max()
    for name, gradient in exact[1].items():
        assert ours[1][name].dtype == torch.float32
        assert (ours[1][name] - gradient).norm() <= 1.5 * (plain[1][name] - gradient).norm()


@pytest.mark.parametrize("kept", [True, False])
def test_a_uniform_loss_gets_the_same_gradients_even_if_it_is_not(kept: bool, load: Load) -> None:
    plugin = CcePlugin()
    plugin.expected.uniform = True
    needs: frozenset[Need] = frozenset({"logps"})
    expected = outcome(load("tied"), batch_of(), needs, weighted=not kept)
    got = outcome(load("tied", LITTLE, plugin), batch_of(), needs, weighted=not kept)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_trained_copy_of_the_head_is_trained_the_same(load: Load) -> None:
    lora = {"targets": ["q_proj"], "modules_to_save": ["lm_head"]}
    needs: frozenset[Need] = frozenset({"logps"})
    expected = outcome(load("plain", **lora), batch_of(), needs)
    model = load("plain", LITTLE, **lora)
    torch.testing.assert_close(outcome(model, batch_of(), needs), expected, rtol=1e-4, atol=1e-6)
    assert any("lm_head" in name for name in expected[1])


def test_with_adapters_switched_off_the_original_head_answers(load: Load) -> None:
    """As for a reference that is the policy without its adapter."""
    needs: frozenset[Need] = frozenset({"logps"})
    model = load("plain", {}, targets=["q_proj"], modules_to_save=["lm_head"])
    module: Any = model.module
    with torch.no_grad():
        next(p for name, p in module.named_parameters() if "modules_to_save" in name).mul_(3)
        changed = model.compute(module, batch_of(), needs).logps_N
        module.lm_head.enable_adapters(False)
        original = model.compute(module, batch_of(), needs).logps_N
        expected = load("plain").compute(load("plain").module, batch_of(), needs).logps_N
    torch.testing.assert_close(original, expected)
    assert not torch.allclose(changed, expected)


def test_hooks_of_the_projection_run_and_change_no_result() -> None:
    layer = torch.nn.Linear(4, 7)
    seen: list[object] = []
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: torch.zeros(1))
    hidden = torch.randn(3, 4)
    found = call(layer, hidden, lambda x, w, b: (torch.nn.functional.linear(x, w, b).sum(-1), None))
    torch.testing.assert_close(found[0], (hidden @ layer.weight.T + layer.bias).sum(-1))
    assert seen == ["before"]
    assert "forward" not in vars(layer)


def test_no_trained_token_still_reaches_every_parameter(load: Load) -> None:
    _, gradients = outcome(load("plain", {}), batch_of(0), frozenset({"logps"}))
    assert gradients.keys() == dict(load().module.named_parameters()).keys()
    assert not any(gradient.any() for gradient in gradients.values())


def test_a_loss_that_needs_logits_in_evaluation_still_gets_them(load: Load) -> None:
    outputs = load("capped", {}).compute(load("capped", {}).module, batch_of(), frozenset({"logits"}))
    assert outputs.logits_NV.shape == (batch_of().trained_tokens, 384)


@pytest.mark.parametrize(
    ("lora", "message"),
    [({"targets": ["lm_head"]}, "head is a Linear with an adapter"), ({"tokens": [3]}, "head is a")],
)
def test_a_head_with_an_adapter_is_refused(lora: dict[str, Any], message: str, load: Load) -> None:
    with pytest.raises(ConfigError, match=message):
        load("tied" if "tokens" in lora else "plain", {}, **lora)


def test_a_quantized_head_is_refused(load: Load) -> None:
    from pegbox_cce.projection import _require_floating

    with pytest.raises(ConfigError, match="weight of the head is quantized"):
        _require_floating(torch.zeros(4, 1, dtype=torch.uint8))

    class Packed(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(ConfigError, match="head is a Packed"):
        linear_layers(Packed(3, 3))


def test_a_head_in_shards_that_nobody_gathered_is_refused() -> None:
    from torch import distributed
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        layer = torch.nn.Linear(3, 3)
        mesh = init_device_mesh("cpu", (1,))
        layer.weight = torch.nn.Parameter(distribute_tensor(torch.ones(3, 3), mesh, [Shard(0)]))
        with pytest.raises(ConfigError, match="is in shards"):
            call(layer, torch.ones(1, 3), lambda x, w, b: (x, None))
    finally:
        distributed.destroy_process_group()


def test_two_plugins_on_the_head_are_an_error_that_names_both(load: Load, tmp_path) -> None:
    from pegbox.patches import PatchLog
    from pegbox.plan import compose

    model = load("plain")
    config = {"model": {"name": "x"}, "plugins": ["hf", "cce", "chunked-cross-entropy"], "output": str(tmp_path / "o")}
    ctx = compose(config)
    with pytest.raises(PatchError, match=r"two patches for the head .*'cce'.*'chunked-cross-entropy'"):
        PatchLog().apply(model, ctx.each(hooks.patch_modules, ctx, model, "base"))
