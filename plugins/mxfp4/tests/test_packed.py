"""Experts in MXFP4: loaded in their packed size, and computed as transformers computes them unpacked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packed_checkpoints import EXPERTS, PARTS, composed, gradients, logps, prepared
from pegbox.errors import ConfigError
from pegbox.testing.tiny import tiny_batches
from pegbox.types import Model
from pegbox_kernels.mxfp4 import PackedMxfp4
from pegbox_mxfp4.experts import experts_of
from pegbox_mxfp4.inspection import require_cheap_adapters
from pegbox_mxfp4.weight import PackedWeight

BATCH = tiny_batches(rows=4)[0]
ATTENTION = {"dtype": "float32", "lora": {"r": 4, "targets": ["q_proj", "v_proj"]}}
ON_EXPERTS = {"dtype": "float32", "lora": {"r": 4, "targets": ["q_proj"], "parameters": EXPERTS}}


def unpacked(**sections: Any) -> Model:
    """The model that transformers makes of the checkpoint, unpacked, under the same adapter, all of it in float32."""
    model = prepared(composed("gpt_oss", ["lora"], **sections))
    model.module.float()
    return model


def weights_of(model: Model) -> list[PackedWeight]:
    return [getattr(module, part) for _, module in experts_of(model.module) for part in PARTS]


def test_experts_are_held_in_the_bytes_of_the_checkpoint() -> None:
    model = prepared(composed("gpt_oss", ["mxfp4", "lora"], **ATTENTION))
    weights = weights_of(model)
    assert len(weights) == 4
    assert {type(weight) for weight in weights} == {PackedWeight}
    assert {tuple(weight.shape) for weight in weights} == {(4, 64, 64), (4, 32, 64)}
    assert sum(weight.packed_bytes for weight in weights) == sum(weight.numel() for weight in weights) * 17 // 32
    assert {inner.dtype for weight in weights for inner in (weight.blocks, weight.scales)} == {torch.uint8}
    assert {"quantized", "experts_mxfp4"} <= model.traits


@pytest.mark.parametrize("sections", [ATTENTION], ids=["attention"])
@pytest.mark.parametrize("plugins", [[], ["scattermoe"], ["activations"]], ids="+".join)
def test_losses_and_gradients_are_those_of_the_unpacked_model(plugins: list[str], sections: Any) -> None:
    expected = unpacked(**sections)
    ctx = composed("gpt_oss", ["mxfp4", "lora", *plugins], **sections)
    ours = prepared(ctx)
    torch.testing.assert_close(logps(ours, BATCH), logps(expected, BATCH), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(ours, BATCH), gradients(expected, BATCH), rtol=1e-4, atol=1e-5)
    ctx.kernel.patches.verify()


def same_factors(of: Model, into: Model) -> None:
    """PEFT rounds new factors to the data type of the weight, which is bfloat16 where transformers unpacks."""
    source = dict(of.module.named_parameters())
    with torch.no_grad():
        for name, parameter in into.module.named_parameters():
            if "lora_" in name:
                parameter.copy_(source[name])


@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[:1], EXPERTS[1:]], ids="+".join)
def test_adapters_on_packed_experts_are_trained_as_on_unpacked_ones(parameters: list[str]) -> None:
    sections = {"dtype": "float32", "lora": {"r": 4, "targets": ["q_proj"], "parameters": parameters}}
    expected, ours = unpacked(**sections), prepared(composed("gpt_oss", ["mxfp4", "lora", "scattermoe"], **sections))
    same_factors(expected, ours)
    torch.testing.assert_close(logps(ours, BATCH), logps(expected, BATCH), rtol=1e-5, atol=1e-5)
    found = gradients(ours, BATCH)
    assert any("experts" in name for name in found)
    torch.testing.assert_close(found, gradients(expected, BATCH), rtol=1e-4, atol=1e-5)


def test_training_ends_where_it_does_unpacked() -> None:
    models = unpacked(**ON_EXPERTS), prepared(composed("gpt_oss", ["mxfp4", "lora", "scattermoe"], **ON_EXPERTS))
    same_factors(*models)
    ends = []
    for model in models:
        trained = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(trained.values(), lr=0.1)
        losses = []
        for batch in tiny_batches(rows=4) * 4:
            loss = -logps(model, batch).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        ends.append((torch.stack(losses), trained))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-4)
    assert ends[0][0][-1] < ends[0][0][0]


def test_in_bfloat16_the_experts_are_those_that_transformers_unpacks() -> None:
    sections = {**ATTENTION, "dtype": "bfloat16"}
    expected, ours = (prepared(composed("gpt_oss", plugins, **sections)) for plugins in (["lora"], ["mxfp4", "lora"]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logps(ours, BATCH), logps(expected, BATCH))
        assert all(map(torch.equal, gradients(ours, BATCH).values(), gradients(expected, BATCH).values()))


class Kept:
    """Bytes that autograd keeps of tensors in the shapes of stacked weights, unpacked."""

    shapes = ((4, 64, 64), (4, 32, 64), (4, 64, 32))

    def __init__(self) -> None:
        self.bytes = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, PackedWeight) and tuple(tensor.shape) in self.shapes:
            self.bytes += tensor.numel() * tensor.element_size()
        return tensor


def test_autograd_keeps_no_unpacked_weight() -> None:
    kept = []
    for packing in ([], ["mxfp4"]):
        model, count = prepared(composed("gpt_oss", [*packing, "lora"], **ATTENTION)), Kept()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            logps(model, BATCH)
        kept.append(count.bytes)
    assert kept[0] > 0
    assert kept[1] == 0


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe"])
def test_experts_in_floating_point_are_packed_while_they_are_loaded(kind: str) -> None:
    sections = {**ATTENTION, "mxfp4": {"quantize": True}}
    plain = prepared(composed(kind, ["lora"], packed=False, **ATTENTION))
    model = prepared(composed(kind, ["mxfp4", "lora"], packed=False, **sections))
    for (_, expected), (_, found) in zip(experts_of(plain.module), experts_of(model.module), strict=True):
        for part in PARTS:
            weight, packed = getattr(expected, part), getattr(found, part)
            outwards = weight.transpose(1, 2) if expected.is_transposed else weight
            again = PackedMxfp4.quantize(outwards).dequantize(torch.float32)
            assert torch.equal(packed.unpacked(), again.transpose(1, 2) if expected.is_transposed else again)
            with torch.no_grad():
                weight.copy_(packed.unpacked())
    torch.testing.assert_close(logps(model, BATCH), logps(plain, BATCH), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(model, BATCH), gradients(plain, BATCH), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_other_ways_of_transformers_compute_the_same(implementation: str) -> None:
    model = prepared(composed("gpt_oss", ["mxfp4", "lora"], **ATTENTION))
    expected = logps(model, BATCH), gradients(model, BATCH)
    model.module.set_experts_implementation(implementation)
    found = logps(model, BATCH), gradients(model, BATCH)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_plan_without_weights_shows_packed_shapes() -> None:
    ctx = composed("gpt_oss", ["mxfp4", "lora", "scattermoe"], **ON_EXPERTS)
    model = prepared(ctx, meta=True)
    assert {weight.device.type for weight in weights_of(model)} == {"meta"}
    assert [weight.packed_bytes for weight in weights_of(model)] == [
        weight.packed_bytes for weight in weights_of(prepared(composed("gpt_oss", ["mxfp4", "lora"], **ATTENTION)))
    ]


WRONG = {
    "no adapter": (["mxfp4"], True, {}, "no plugin applies adapters"),
    "stored in floating point": (["mxfp4", "lora"], False, {}, "holds no weight in MXFP4"),
    "packed twice": (["mxfp4", "lora"], True, {"mxfp4": {"quantize": True}}, "in MXFP4 already"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused(case: str) -> None:
    plugins, packed, sections, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        prepared(composed("gpt_oss", plugins, packed=packed, **sections))


@pytest.mark.parametrize(("packed", "quantize"), [(True, True), (False, False)])
def test_a_plan_refuses_another_storage(packed: bool, quantize: bool) -> None:
    ctx = composed("gpt_oss", ["mxfp4", "lora"], packed=packed, mxfp4={"quantize": quantize})
    with pytest.raises(ConfigError, match=r"is stored in .*, and mxfp4\.quantize is"):
        prepared(ctx, meta=True)


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="no stacked experts"):
        prepared(composed("llama", ["mxfp4", "lora"], packed=False, mxfp4={"quantize": True}))


def test_several_processes_are_refused_before_weights_are_read() -> None:
    ctx = composed("gpt_oss", ["mxfp4", "lora"])
    ctx.runtime = SimpleNamespace(rank=0, local_rank=0, world_size=2, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="2 processes train"):
        prepared(ctx)


def test_adapters_on_packed_experts_need_the_plugin_that_computes_them() -> None:
    ctx = composed("gpt_oss", ["mxfp4", "lora"], **ON_EXPERTS)
    with pytest.raises(ConfigError, match="Add scattermoe to plugins"):
        require_cheap_adapters(ctx, prepared(ctx))
    ctx = composed("gpt_oss", ["mxfp4", "lora", "scattermoe"], **ON_EXPERTS)
    require_cheap_adapters(ctx, prepared(ctx))
