"""Layouts of expert LoRA: against PEFT's own delta and forward, and there and back again."""

from __future__ import annotations

import pytest
import torch
from pegbox_kernels.experts import ExpertLora, moe_experts
from pegbox_kernels.experts.lora_layout import W1_W3_W2, from_peft, from_per_expert, to_peft, to_per_expert

E, H, INNER, RANK = 3, 16, 8, 2


def factors(seed: int = 0) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Canonical pairs of gate_up and down."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return (normal(E, RANK, H), normal(E, 2 * INNER, RANK)), (normal(E, RANK, INNER), normal(E, H, RANK))


def tiny_experts(family: str) -> torch.nn.Module:
    """A module whose `experts` are transformers' own, with random weights."""
    pytest.importorskip("transformers")
    if family == "gpt_oss":
        from transformers import GptOssConfig
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts as Experts

        config = GptOssConfig(num_local_experts=E, hidden_size=H, intermediate_size=INNER)
    else:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts as Experts

        config = Qwen3MoeConfig(num_experts=E, hidden_size=H, moe_intermediate_size=INNER)
    config._experts_implementation = "eager"
    holder = torch.nn.Module()
    holder.experts = Experts(config)
    for parameter in holder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    holder.forward = lambda *args: holder.experts(*args)
    return holder


def wrapped(family: str):
    """The tiny experts under PEFT with both parameters targeted and B not zero, and its two wrappers by parameter."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=6,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(tiny_experts(family), config)
    from peft.tuners.lora.layer import ParamWrapper

    return model, {m.parameter_name: m for m in model.modules() if isinstance(m, ParamWrapper)}


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_what_is_read_from_peft_has_the_delta_that_peft_adds(family: str) -> None:
    _, wrappers = wrapped(family)
    for wrapper in wrappers.values():
        a, b = from_peft(wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight, E)
        ours = wrapper.scaling["default"] * torch.bmm(b, a)
        theirs = wrapper.get_delta_weight("default")
        torch.testing.assert_close(ours.transpose(1, 2) if family == "gpt_oss" else ours, theirs)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_the_layer_with_what_is_read_from_peft_computes_what_peft_computes(family: str, device) -> None:
    model, wrappers = wrapped(family)
    hidden = torch.randn(5, H)
    chosen, weights = torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1], [1, 0]]), torch.rand(5, 2)
    with torch.no_grad():
        theirs = model(hidden, chosen, weights)
    loras = {}
    for name, wrapper in wrappers.items():
        a, b = from_peft(wrapper.lora_A["default"].weight.data, wrapper.lora_B["default"].weight.data, E)
        loras[name] = ExpertLora(a.to(device), b.to(device), wrapper.scaling["default"])
    experts = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
    gpt_oss = family == "gpt_oss"
    ours = moe_experts(
        *(tensor.to(device) for tensor in (hidden, chosen, weights, experts.gate_up_proj.data, experts.down_proj.data)),
        gate_up_bias_EJ=experts.gate_up_proj_bias.data.to(device) if gpt_oss else None,
        down_bias_EH=experts.down_proj_bias.data.to(device) if gpt_oss else None,
        activation="gpt_oss" if gpt_oss else "swiglu",
        interleaved=gpt_oss,
        transposed=gpt_oss,
        lora_gate_up=loras["gate_up_proj"],
        lora_down=loras["down_proj"],
    )
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)


def test_what_is_written_for_peft_is_what_peft_would_read() -> None:
    _, wrappers = wrapped("gpt_oss")
    wrapper = wrappers["gate_up_proj"]
    pair, _ = factors()
    a, b = to_peft(*pair)
    assert a.shape == wrapper.lora_A["default"].weight.shape
    assert b.shape == wrapper.lora_B["default"].weight.shape
    wrapper.lora_A["default"].weight.data, wrapper.lora_B["default"].weight.data = a, b
    delta = wrapper.scaling["default"] * torch.bmm(pair[1], pair[0]).transpose(1, 2)
    torch.testing.assert_close(wrapper.get_delta_weight("default"), delta)


def test_pefts_layout_comes_back_as_it_went() -> None:
    for pair in factors():
        for found, expected in zip(from_peft(*to_peft(*pair), E), pair, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_adapters_of_single_experts_come_back_with_the_same_rank(interleaved: bool) -> None:
    gate_up, down = factors()
    tensors = to_per_expert(gate_up, down, interleaved=interleaved)
    assert len(tensors) == E * 3 * 2
    assert tensors["experts.1.gate_proj.lora_B.weight"].shape == (INNER, RANK)
    found = from_per_expert(tensors, E, interleaved=interleaved)
    for pair, expected in zip(found, (gate_up, down), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(pair, expected, strict=True))


def test_adapters_of_single_experts_have_the_names_that_are_asked() -> None:
    gate_up, down = factors()
    usual = to_per_expert(gate_up, down, interleaved=True)
    named = to_per_expert(gate_up, down, interleaved=True, prefix="x.experts", names=W1_W3_W2)
    for name, other in zip(("gate_proj", "up_proj", "down_proj"), W1_W3_W2, strict=True):
        theirs = usual[f"experts.2.{name}.lora_B.weight"]
        assert torch.equal(named[f"x.experts.2.{other}.lora_B.weight"], theirs)
    (_, b), _ = from_per_expert(named, E, interleaved=True, prefix="x.experts", names=W1_W3_W2)
    assert torch.equal(b, gate_up[1])


@pytest.mark.parametrize("interleaved", [False, True])
def test_gate_and_up_with_factors_of_their_own_keep_their_deltas(interleaved: bool) -> None:
    tensors = to_per_expert(*factors(), interleaved=interleaved)
    for expert in range(E):
        tensors[f"experts.{expert}.up_proj.lora_A.weight"] = torch.randn(RANK, H)
    (a, b), _ = from_per_expert(tensors, E, interleaved=interleaved)
    assert a.shape[1] == 2 * RANK
    delta = torch.bmm(b, a)
    gate, up = (delta[:, ::2], delta[:, 1::2]) if interleaved else delta.chunk(2, dim=1)
    for expert in range(E):
        for name, part in (("gate_proj", gate), ("up_proj", up)):
            theirs = [tensors[f"experts.{expert}.{name}.lora_{side}.weight"] for side in "BA"]
            torch.testing.assert_close(part[expert], theirs[0] @ theirs[1])


def test_a_wrong_number_of_experts_is_named() -> None:
    a, b = to_peft(*factors()[0])
    with pytest.raises(ValueError, match=r"A \(6, 16\) and B \(16, 6\) of 4 experts"):
        from_peft(a, b, 4)
    with pytest.raises(ValueError, match=r"experts\.3\.gate_proj\.lora_A\.weight is not among the 18 tensors"):
        from_per_expert(to_per_expert(*factors(), interleaved=False), 4, interleaved=False)
