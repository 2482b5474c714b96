"""The expert layer: against transformers' own experts, its LoRA, its edges, and what autograd and compile make of it.

Agreement with the fp64 reference over shapes, layouts, providers and dtypes is in test_parity.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pegbox_kernels.experts import ExpertLora, Routing, moe_experts, reference
from pegbox_kernels.mxfp4 import PackedMxfp4

T, K, E, H, INNER, RANK = 9, 2, 4, 32, 16, 3
BASES = ("grouped_mm", "triton")


def inputs(device: torch.device, *, seed: int = 0, transposed: bool = True, experts: int = E) -> dict[str, Any]:
    """Tensors of one layer, by the names of `moe_experts`; the last expert gets no token."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, spread: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * spread).to(device)

    gate_up = (experts, H, 2 * INNER) if transposed else (experts, 2 * INNER, H)
    down = (experts, INNER, H) if transposed else (experts, H, INNER)
    return {
        "hidden_TH": normal(T, H),
        "experts_TK": torch.randint(0, max(1, experts - 1), (T, K), generator=generator).to(device),
        "weights_TK": normal(T, K).softmax(-1),
        "gate_up": normal(*gate_up, spread=H**-0.5),
        "down": normal(*down, spread=INNER**-0.5),
        "gate_up_bias_EJ": normal(experts, 2 * INNER),
        "down_bias_EH": normal(experts, H),
        "transposed": transposed,
    }


def pair(device: torch.device, width: int, size: int, *, experts: int = E, scale: float = 1.5) -> ExpertLora:
    a = torch.randn(experts, RANK, width, generator=torch.Generator().manual_seed(1)) * width**-0.5
    b = torch.randn(experts, size, RANK, generator=torch.Generator().manual_seed(2)) * 0.3
    return ExpertLora(a.to(device).requires_grad_(), b.to(device).requires_grad_(), scale)


def leaves(given: dict[str, Any], *frozen: str) -> dict[str, torch.Tensor]:
    """Mark the floating tensors of `given` for a gradient, but for the frozen ones."""
    floating = {n: t for n, t in given.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    return {name: tensor.requires_grad_() for name, tensor in floating.items() if name not in frozen}


def upstream(out: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_values_and_all_gradients_are_those_of_the_experts_of_transformers(family: str, base: str, device) -> None:
    pytest.importorskip("transformers")
    gpt_oss = family == "gpt_oss"
    if gpt_oss:
        from transformers import GptOssConfig
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts as Experts

        config = GptOssConfig(num_local_experts=E, hidden_size=H, intermediate_size=INNER)
    else:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts as Experts

        config = Qwen3MoeConfig(num_experts=E, hidden_size=H, moe_intermediate_size=INNER)
    config._experts_implementation = "eager"
    module = Experts(config).to(device)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.8)
    module.limit = 1.0
    given = inputs(device)
    hidden, weights = given["hidden_TH"].requires_grad_(), given["weights_TK"].requires_grad_()
    chosen = given["experts_TK"]
    trained = {"hidden": hidden, "weights": weights, **dict(module.named_parameters())}
    theirs = module(hidden, chosen, weights)
    expected = torch.autograd.grad(theirs, trained.values(), upstream(theirs))
    biases = {}
    if gpt_oss:
        biases = {"gate_up_bias_EJ": module.gate_up_proj_bias, "down_bias_EH": module.down_proj_bias}
    ours = moe_experts(
        *(hidden, chosen, weights, module.gate_up_proj, module.down_proj),
        **biases,
        activation="gpt_oss" if gpt_oss else "swiglu",
        interleaved=gpt_oss,
        transposed=gpt_oss,
        limit=1.0,
        base=base,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for name, one, other in zip(
        trained, torch.autograd.grad(ours, trained.values(), upstream(ours)), expected, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("base", BASES)
def test_lora_equals_the_weight_with_its_delta_and_has_its_gradient(base: str, device) -> None:
    given = inputs(device)
    up, down = pair(device, H, 2 * INNER), pair(device, INNER, H, scale=0.7)
    factors = (up.a_ERI, up.b_EOR, down.a_ERI, down.b_EOR)
    trained = (*leaves(given, "gate_up", "down").values(), *factors)
    ours = moe_experts(**given, activation="gpt_oss", interleaved=True, lora_gate_up=up, lora_down=down, base=base)
    found = torch.autograd.grad(ours, trained, upstream(ours))
    merged = {
        name: given[name] + lora.scale * torch.bmm(lora.b_EOR, lora.a_ERI).transpose(1, 2)
        for name, lora in (("gate_up", up), ("down", down))
    }
    theirs = reference.moe_experts(**(given | merged), activation="gpt_oss", interleaved=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for one, other in zip(found, torch.autograd.grad(theirs, trained, upstream(theirs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("base", BASES)
def test_lora_on_one_product_alone_leaves_the_other_as_it_is(base: str, device) -> None:
    for name, width, size in (("lora_gate_up", H, 2 * INNER), ("lora_down", INNER, H)):
        given = inputs(device, transposed=False)
        lora = pair(device, width, size)
        ours = moe_experts(**given, **{name: lora}, base=base)
        theirs = reference.moe_experts(**given, **{name: (lora.a_ERI, lora.b_EOR, lora.scale)})
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        found, expected = (torch.autograd.grad(out, (lora.a_ERI, lora.b_EOR), upstream(out)) for out in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("base", BASES)
def test_packed_experts_give_bit_for_bit_what_their_unpacked_weights_give(base: str, device) -> None:
    given = inputs(device, transposed=False) | {"transposed": True}
    # 32 numbers are packed together, so that both products need inputs of at least 32.
    generator = torch.Generator().manual_seed(3)
    given["down"] = torch.randn(E, H, 32, generator=generator).to(device)
    given["gate_up"] = torch.randn(E, 64, H, generator=generator).to(device)
    given["gate_up_bias_EJ"] = None
    packed = {name: PackedMxfp4.quantize(given[name]) for name in ("gate_up", "down")}
    plain = {name: tensor.dequantize(torch.float32).transpose(1, 2) for name, tensor in packed.items()}
    results = []
    for weights in (packed, plain):
        hidden = given["hidden_TH"].clone().requires_grad_()
        lora = pair(device, 32, H)
        out = moe_experts(**(given | weights | {"hidden_TH": hidden}), lora_down=lora, base=base)
        results.append((out, *torch.autograd.grad(out, (hidden, lora.a_ERI, lora.b_EOR), upstream(out))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("base", BASES)
def test_what_is_computed_again_equals_what_is_kept_and_each_run_equals_the_next(base: str, device) -> None:
    given = inputs(device)
    up, down = pair(device, H, 2 * INNER), pair(device, INNER, H)
    trained = (*leaves(given).values(), up.a_ERI, up.b_EOR, down.a_ERI, down.b_EOR)
    runs = []
    for save in ("preactivation", "none", "preactivation"):
        out = moe_experts(**given, interleaved=True, lora_gate_up=up, lora_down=down, base=base, save=save)
        runs.append((out, *torch.autograd.grad(out, trained, upstream(out))))
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("base", BASES)
def test_every_element_is_written_and_an_expert_without_tokens_has_gradients_of_zero(base, device, poison) -> None:
    given = inputs(device)
    given["experts_TK"][1, 0] = -1
    up, down = pair(device, H, 2 * INNER), pair(device, INNER, H)
    trained = leaves(given) | {"a1": up.a_ERI, "b1": up.b_EOR, "a2": down.a_ERI, "b2": down.b_EOR}
    with poison():
        out = moe_experts(**given, interleaved=True, lora_gate_up=up, lora_down=down, base=base)
        found = dict(zip(trained, torch.autograd.grad(out, trained.values(), upstream(out)), strict=True))
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in found.values())
    for name in ("gate_up", "down", "gate_up_bias_EJ", "down_bias_EH", "a1", "b1", "a2", "b2"):
        assert torch.equal(found[name][E - 1], torch.zeros_like(found[name][E - 1])), name
        assert (found[name][0] != 0).any(), name
    assert found["weights_TK"][1, 0] == 0


@pytest.mark.parametrize("base", BASES)
def test_no_tokens_give_no_rows_and_gradients_of_zero(base: str, device) -> None:
    given = inputs(device)
    given |= {name: given[name][:0] for name in ("hidden_TH", "experts_TK", "weights_TK")}
    lora = pair(device, INNER, H)
    trained = (*leaves(given).values(), lora.a_ERI, lora.b_EOR)
    out = moe_experts(**given, lora_down=lora, base=base)
    assert out.shape == (0, H)
    for gradient in torch.autograd.grad(out.sum(), trained):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_frozen_weights_get_no_gradient_and_none_is_computed(device, monkeypatch: pytest.MonkeyPatch) -> None:
    from pegbox_kernels.experts import grouped

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a gradient of frozen weights was computed")

    monkeypatch.setattr(grouped, "weight_gradient", refuse)
    monkeypatch.setattr(grouped, "grouped_mm_weight_gradient", refuse)
    for base in BASES:
        given = inputs(device)
        lora = pair(device, INNER, H)
        hidden = given["hidden_TH"].requires_grad_()
        moe_experts(**given, lora_down=lora, base=base).sum().backward()
        assert hidden.grad is not None
        assert given["gate_up"].grad is None


def test_weights_that_lie_as_views_and_gradients_that_are_expanded_change_nothing(device) -> None:
    given = inputs(device)
    hidden = given["hidden_TH"].requires_grad_()
    expected = moe_experts(**given)
    (plain,) = torch.autograd.grad(expected, hidden, torch.ones_like(expected))
    wide = torch.zeros(E, H + 5, 2 * INNER + 3, device=device)
    wide[:, :H, : 2 * INNER] = given["gate_up"]
    views = {
        "gate_up": wide[:, :H, : 2 * INNER],
        "down": given["down"].transpose(0, 1).contiguous().transpose(0, 1),
        "experts_TK": given["experts_TK"].int().t().contiguous().t(),
        "weights_TK": given["weights_TK"].double(),
    }
    found = moe_experts(**(given | views))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), hidden)[0], plain)
    with pytest.raises(ValueError, match=r"torch's grouped_mm needs sizes .* Use base='auto'"):
        moe_experts(**(given | views), base="grouped_mm")


def test_rows_sorted_before_may_be_given(device) -> None:
    given = inputs(device)
    routing = Routing.of(given["experts_TK"], E)
    assert torch.equal(moe_experts(**given, routing=routing), moe_experts(**given))


def test_lora_in_fp32_beside_bf16_experts_gets_its_gradient_in_fp32(device) -> None:
    given = {n: t.bfloat16() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in inputs(device).items()}
    lora = pair(device, INNER, H)
    out = moe_experts(**given, lora_down=lora)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert lora.a_ERI.grad is not None
    assert lora.a_ERI.grad.dtype == torch.float32


def test_nothing_is_kept_for_a_backward_that_cannot_come(device) -> None:
    from pegbox_kernels.experts import operators

    given = inputs(device)
    with torch.no_grad():
        moe_experts(**given)
    routing = Routing.of(given["experts_TK"], E)
    tensors = [given["hidden_TH"], given["experts_TK"], given["weights_TK"], *routing, given["gate_up"], None]
    tensors += [given["down"], None, None, None, None, None, None, None]
    _, z, *_ = operators.forward(*tensors, True, "swiglu", False, 1.0, 7.0, 1.0, 1.0, "triton", False)
    assert z.numel() == 0


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "gpt_oss"])
def test_without_a_backward_the_activation_is_taken_from_the_sum_and_gives_the_same(
    activation: str, interleaved: bool, device, poison
) -> None:
    given = inputs(device) | {"activation": activation, "interleaved": interleaved}
    loras = {"lora_gate_up": pair(device, H, 2 * INNER), "lora_down": pair(device, INNER, H)}
    expected = moe_experts(**given, **loras, base="triton")
    with torch.no_grad(), poison():
        found = moe_experts(**given, **loras, base="triton")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_second_derivative_is_refused(device) -> None:
    given = inputs(device)
    hidden = given["hidden_TH"].requires_grad_()
    (grad,) = torch.autograd.grad(moe_experts(**given).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.square().sum().backward()


def test_the_operator_passes_opcheck(device) -> None:
    given = inputs(device)
    lora = pair(device, INNER, H)
    routing = Routing.of(given["experts_TK"], E)
    hidden = given["hidden_TH"].requires_grad_()
    tensors = [hidden, given["experts_TK"], given["weights_TK"], *routing, given["gate_up"], None, given["down"], None]
    tensors += [given["gate_up_bias_EJ"], given["down_bias_EH"], None, None, lora.a_ERI, lora.b_EOR]
    options = (True, "gpt_oss", True, 1.702, 7.0, 1.0, 1.5, "triton", True)
    torch.library.opcheck(torch.ops.pegbox_kernels.moe_experts.default, (*tensors, *options))


def test_torch_compile_keeps_it_in_one_graph_with_the_same_gradient(device) -> None:
    given = inputs(device)
    hidden = given["hidden_TH"].requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return moe_experts(**(given | {"hidden_TH": x * 1.5}), interleaved=True).square().sum()

    expected = torch.autograd.grad(loss(hidden), hidden)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(hidden), hidden), expected)


def test_the_reference_passes_gradcheck_in_fp64() -> None:
    given = {n: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in inputs("cpu").items()}
    small = given | {"gate_up": given["gate_up"][:, :, :8], "down": given["down"][:, :4], "gate_up_bias_EJ": None}
    trained = leaves({name: small[name].detach() for name in ("hidden_TH", "weights_TK", "down")})

    def layer(*tensors: torch.Tensor) -> torch.Tensor:
        return reference.moe_experts(
            **(small | dict(zip(trained, tensors, strict=True))), activation="gpt_oss", interleaved=True
        )

    assert torch.autograd.gradcheck(layer, tuple(trained.values()))


def test_without_kernels_the_reference_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine with neither GPU nor interpreter computes: the same numbers, one expert at a time."""
    import pegbox_kernels.experts as op

    given = inputs(torch.device("cpu"))
    lora = pair(torch.device("cpu"), H, 2 * INNER)
    expected = moe_experts(**given, lora_gate_up=lora)
    monkeypatch.setattr(op, "runs_kernels", lambda tensor: False)
    torch.testing.assert_close(moe_experts(**given, lora_gate_up=lora), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="base='grouped_mm' with tensors on cpu"):
        moe_experts(**given, base="grouped_mm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "activation is 'gelu': write one of swiglu, gpt_oss"),
        ({"base": "cublas"}, "base is 'cublas'"),
        ({"hidden_TH": torch.zeros(2, 3, H)}, r"hidden_TH \(2, 3, 32\).* flatten batch and sequence"),
        ({"weights_TK": torch.zeros(T, 1)}, r"weights_TK \(9, 1\) do not fit"),
        ({"weights_TK": torch.zeros(T, K).long()}, "indices first"),
        ({"transposed": False}, "With transposed=True they are the other way round"),
        ({"gate_up_bias_EJ": torch.zeros(E, INNER)}, r"gate_up_bias_EJ is \(4, 16\): it must be \(4, 32\)"),
        ({"down": torch.zeros(E, INNER, H).bfloat16()}, "down torch.bfloat16. Convert one of them"),
        ({"lora_down": ExpertLora(torch.zeros(E * 2, INNER), torch.zeros(H, 2 * E), 1.0)}, "lora_layout converts PEFT"),
        ({"gate_up": torch.zeros(E, H)}, "both have three dimensions"),
    ],
)
def test_a_wrong_argument_is_named_with_the_value_seen(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moe_experts(**(inputs(torch.device("cpu")) | change))


def test_a_dtype_without_kernels_is_refused(device) -> None:
    given = {n: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in inputs(device).items()}
    with pytest.raises(ValueError, match=r"hidden_TH is torch\.float64: the kernels compute"):
        moe_experts(**given)
