"""The expert layer: against transformers' own experts, its LoRA, its edges, and what autograd and compile make of it.

Agreement with the fp64 reference over shapes, layouts, providers and dtypes is in test_parity.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import pytest
import torch
from pegbox_kernels.experts import ExpertLora, Routing, moe_experts, reference
from pegbox_kernels.harness.parity import SLACK, error
from pegbox_kernels.mxfp4 import PackedMxfp4
from torch.utils._python_dispatch import TorchDispatchMode

T, K, E, H, INNER, RANK = 9, 2, 4, 32, 16, 3
BASES = ("grouped_mm", "triton")


def dtype_of(base: str, device: torch.device) -> torch.dtype:
    """What both providers are tested in; torch's takes bf16 alone on a GPU."""
    return torch.bfloat16 if base == "grouped_mm" and device.type == "cuda" else torch.float32


def inputs(
    device: torch.device, dtype: torch.dtype = torch.float32, *, transposed: bool = True, experts: int = E
) -> dict[str, Any]:
    """Tensors of one layer, by the names of `moe_experts`; the last expert gets no token."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, spread: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * spread).to(device, dtype)

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


def pair(
    device: torch.device, width: int, size: int, *, scale: float = 1.5, dtype: torch.dtype = torch.float32
) -> ExpertLora:
    a = torch.randn(E, RANK, width, generator=torch.Generator().manual_seed(1)) * width**-0.5
    b = torch.randn(E, size, RANK, generator=torch.Generator().manual_seed(2)) * 0.3
    return ExpertLora(a.to(device, dtype).requires_grad_(), b.to(device, dtype).requires_grad_(), scale)


def leaves(given: dict[str, Any], *frozen: str) -> dict[str, torch.Tensor]:
    """Mark the floating tensors of `given` for a gradient, but for the frozen ones."""
    floating = {n: t for n, t in given.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    return {name: tensor.requires_grad_() for name, tensor in floating.items() if name not in frozen}


def upstream(out: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape).to(out.dtype)


def outcome(out: torch.Tensor, of: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The output, and the gradients of a sum that weighs every element differently."""
    return [out.detach(), *torch.autograd.grad(out, tuple(of), upstream(out))]


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in another dtype, as leaves; of a dictionary or a tuple, each."""
    if isinstance(value, dict):
        return {name: in_dtype(part, dtype) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(in_dtype(part, dtype) for part in value)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(dtype).requires_grad_(value.requires_grad)


def assert_fair(ours: list[torch.Tensor], plain: list[torch.Tensor], truth: list[torch.Tensor]) -> None:
    """The rule of harness/parity.py: at most twice as far from fp64 as plain PyTorch in the same dtype."""
    for place, (one, other, exact) in enumerate(zip(ours, plain, truth, strict=True)):
        floor = 1e-5 * max(1.0, exact.abs().max().item())
        assert error(one, exact) <= SLACK * error(other, exact) + floor, f"tensor {place}, {tuple(one.shape)}"


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
    dtype = dtype_of(base, device)
    # A bf16 product beside a bound of the clamp falls on either side of it: there, none comes near.
    spread, limit = (0.8, 1.0) if dtype == torch.float32 else (0.2, 7.0)
    module = Experts(config)
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=spread)
    module = module.to(device, dtype)
    exact = deepcopy(module).double()
    given = inputs(device, dtype)
    chosen = given["experts_TK"]

    def theirs(module: torch.nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
        module.limit = limit
        hidden, weights = (in_dtype(given[name], dtype).requires_grad_() for name in ("hidden_TH", "weights_TK"))
        return outcome(module(hidden, chosen, weights), (hidden, weights, *module.parameters()))

    hidden, weights = given["hidden_TH"].requires_grad_(), given["weights_TK"].requires_grad_()
    biases = {}
    if gpt_oss:
        biases = {"gate_up_bias_EJ": module.gate_up_proj_bias, "down_bias_EH": module.down_proj_bias}
    ours = moe_experts(
        *(hidden, chosen, weights, module.gate_up_proj, module.down_proj),
        **biases,
        activation="gpt_oss" if gpt_oss else "swiglu",
        interleaved=gpt_oss,
        transposed=gpt_oss,
        limit=limit,
        base=base,
    )
    found = outcome(ours, (hidden, weights, *module.parameters()))
    assert_fair(found, theirs(module, dtype), theirs(exact, torch.float64))


@pytest.mark.parametrize("base", BASES)
def test_lora_equals_the_weight_with_its_delta_and_has_its_gradient(base: str, device) -> None:
    dtype = dtype_of(base, device)
    given = inputs(device, dtype)
    up, down = pair(device, H, 2 * INNER, dtype=dtype), pair(device, INNER, H, scale=0.7, dtype=dtype)
    factors = {"gate_up": (up.a_ERI, up.b_EOR, up.scale), "down": (down.a_ERI, down.b_EOR, down.scale)}
    options = {"activation": "gpt_oss", "interleaved": True}
    trained = (*leaves(given, "gate_up", "down").values(), *factors["gate_up"][:2], *factors["down"][:2])
    found = outcome(moe_experts(**given, **options, lora_gate_up=up, lora_down=down, base=base), trained)

    def merged(dtype: torch.dtype) -> list[torch.Tensor]:
        cast, pairs = in_dtype(given, dtype), in_dtype(factors, dtype)
        whole = cast | {
            name: torch.baddbmm(cast[name], a.transpose(1, 2), b.transpose(1, 2), alpha=scale)
            for name, (a, b, scale) in pairs.items()
        }
        of = [tensor for tensor in cast.values() if torch.is_tensor(tensor) and tensor.requires_grad]
        return outcome(reference.moe_experts(**whole, **options), (*of, *pairs["gate_up"][:2], *pairs["down"][:2]))

    assert len(found) == 1 + len(trained)
    assert_fair(found, merged(dtype), merged(torch.float64))


@pytest.mark.parametrize("base", BASES)
def test_lora_on_one_product_alone_leaves_the_other_as_it_is(base: str, device) -> None:
    dtype = dtype_of(base, device)
    for name, width, size in (("lora_gate_up", H, 2 * INNER), ("lora_down", INNER, H)):
        given = inputs(device, dtype, transposed=False)
        lora = pair(device, width, size, dtype=dtype)
        factors = (lora.a_ERI, lora.b_EOR)

        def plain(dtype: torch.dtype) -> list[torch.Tensor]:
            a, b = in_dtype(factors, dtype)  # noqa: B023
            return outcome(reference.moe_experts(**in_dtype(given, dtype), **{name: (a, b, lora.scale)}), (a, b))  # noqa: B023

        found = outcome(moe_experts(**given, **{name: lora}, base=base), factors)
        assert_fair(found, plain(dtype), plain(torch.float64))


@pytest.mark.parametrize("base", BASES)
def test_packed_experts_give_bit_for_bit_what_their_unpacked_weights_give(base: str, device) -> None:
    dtype = dtype_of(base, device)
    given = inputs(device, dtype, transposed=False) | {"transposed": True}
    # 32 numbers are packed together, so that both products need inputs of at least 32.
    generator = torch.Generator().manual_seed(3)
    given["down"] = torch.randn(E, H, 32, generator=generator).to(device)
    given["gate_up"] = torch.randn(E, 64, H, generator=generator).to(device)
    given["gate_up_bias_EJ"] = None
    packed = {name: PackedMxfp4.quantize(given[name]) for name in ("gate_up", "down")}
    plain = {name: tensor.dequantize(dtype).transpose(1, 2) for name, tensor in packed.items()}
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
    given = inputs(device, dtype_of(base, device))
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
    given = inputs(device, dtype_of(base, device))
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
    given = inputs(device, dtype_of(base, device))
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
        given = inputs(device, dtype_of(base, device))
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
    # In bf16, which torch's takes on every device; a copy in another dtype would have no gaps.
    cast = in_dtype(given | views, torch.bfloat16) | {"gate_up": wide.bfloat16()[:, :H, : 2 * INNER]}
    with pytest.raises(ValueError, match=r"torch's grouped_mm needs sizes .* Use base='auto'"):
        moe_experts(**cast, base="grouped_mm")


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


@pytest.mark.parametrize("interleaved", [False, True])
def test_columns_of_the_activation_may_be_cut_in_parts(interleaved: bool, device, poison) -> None:
    from pegbox_kernels.experts import activation, glue, grouped

    given, size = inputs(device), 200
    routing = Routing.of(given["experts_TK"], E)
    gate = grouped.Gate("gpt_oss", interleaved, 1.702, 7.0)
    generator = torch.Generator().manual_seed(5)
    z, a = (torch.randn(shape, generator=generator).to(device) for shape in ((T * K, 2 * size), (E, RANK, size)))

    def run(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        launch = glue.Launch(16, columns, stages=2)
        return activation.forward(z, routing, gate, bias=None, lora_in=None, a_out=a, scale_out=0.5, launch=launch)

    with poison():
        (h, projected), (h_parts, projected_parts) = run(64), run(16)
    assert size // (4 * 64) == 0
    assert size // (4 * 16) > 1
    torch.testing.assert_close(h_parts, h, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(projected_parts, projected, rtol=1e-5, atol=1e-5)
    expected = torch.stack([0.5 * a[int((routing.offsets_E <= row).sum())] @ h[row] for row in range(T * K)])
    torch.testing.assert_close(projected, expected, rtol=1e-5, atol=1e-5)


def test_no_gradient_of_zeros_is_filled_for_what_is_kept(device) -> None:
    """The product z comes out of the operator, so that autograd would make one as large."""
    made: list[tuple[int, ...]] = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if "zeros" in str(func):
                made.append(tuple(found.shape))
            return found

    given = inputs(device)
    hidden, weights = given["hidden_TH"].requires_grad_(), given["weights_TK"].requires_grad_()
    out = moe_experts(**given)
    with Shapes():
        torch.autograd.grad(out, (hidden, weights), upstream(out))
    assert (T * K, 2 * INNER) not in made


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
