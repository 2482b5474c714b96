"""Normalization as models do it: their roundings, their gradients, and what autograd and compile make of it.

Agreement with the reference over shapes, layouts and dtypes is in test_parity.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from pegbox_kernels import dispatch
from pegbox_kernels.rms_norm import kernels, reference, rms_norm


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def of_transformers(kind: str, hidden: int):
    """A norm of transformers with a weight of its own, and how the operation says the same."""
    pytest.importorskip("transformers")
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    made, said = {
        "llama": (LlamaRMSNorm(hidden, 1e-6), {}),
        "gpt-oss": (GptOssRMSNorm(hidden, 1e-6), {"cast": "gemma"}),
        "gemma": (Gemma2RMSNorm(hidden, 1e-6), {"cast": "gemma", "offset": 1.0}),
        "gated": (Qwen3NextRMSNormGated(hidden, 1e-6), {}),
    }[kind]
    made.weight.data.add_(rows(hidden, seed=3) * 0.3)
    return made, said


@pytest.mark.parametrize("kind", ["llama", "gpt-oss", "gemma", "gated"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_it_is_that_of_transformers_to_the_last_bit_of_bfloat16(kind: str, weight_dtype: torch.dtype, device) -> None:
    norm, said = of_transformers(kind, 200)
    norm.to(device, weight_dtype)
    x = rows(7, 200, dtype=torch.bfloat16).to(device)
    gate = (rows(7, 200, dtype=torch.bfloat16, seed=1).to(device),) if kind == "gated" else ()
    expected = norm(x, *gate)
    found = rms_norm(x, norm.weight, 1e-6, gate=gate[0] if gate else None, **said)
    assert found.dtype == expected.dtype
    # One number in a hundred may round the other way, because its sum was taken in another order.
    assert (found == expected).float().mean() > 0.98
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)


def test_the_sum_with_the_residual_is_rounded_before_it_is_normalized(device) -> None:
    x, residual = (rows(5, 96, dtype=torch.bfloat16, seed=seed).to(device) for seed in (0, 1))
    weight = rows(96, seed=2).to(device, torch.bfloat16)
    y, total = rms_norm(x, weight, 1e-5, residual=residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(x + residual, weight, 1e-5))


def test_the_gradient_is_the_finite_difference_of_the_value() -> None:
    """In fp64, for every input, without autograd."""
    shape = (3, 5)
    inputs = {name: rows(*shape, seed=i).double() for i, name in enumerate(("x", "residual", "gate"))}
    inputs["weight"] = rows(5, seed=7).double()
    up_y, up_total = rows(*shape, seed=8).double(), rows(*shape, seed=9).double()

    def value(**changed: torch.Tensor) -> torch.Tensor:
        y, total = reference.rms_norm(**{**inputs, **changed}, eps=0.1, offset=1.0, cast="gemma")
        assert total is not None
        return (y * up_y).sum() + (total * up_total).sum()

    h = inputs["x"] + inputs["residual"]
    saved = (h, inputs["weight"], inputs["gate"], reference.reciprocal_root(h, 0.1))
    grad_h, grad_weight, grad_gate = reference.rms_norm_backward(up_y, up_total, *saved, 1.0, "gemma")
    by_hand = {"x": grad_h, "residual": grad_h, "weight": grad_weight, "gate": grad_gate}
    for name, gradient in by_hand.items():
        assert gradient is not None
        for index in range(gradient.numel()):
            step = torch.zeros_like(inputs[name])
            step.view(-1)[index] = 1e-5
            difference = value(**{name: inputs[name] + step}) - value(**{name: inputs[name] - step})
            assert gradient.view(-1)[index].item() == pytest.approx((difference / 2e-5).item(), abs=1e-8)


def test_a_row_scaled_by_a_power_of_two_gives_the_same_row(device) -> None:
    x, weight = rows(4, 300).to(device), rows(300, seed=1).to(device)
    assert torch.equal(rms_norm(x * 64, weight, 0.0), rms_norm(x, weight, 0.0))


@pytest.mark.parametrize("used", [0, 1])
def test_the_gradient_of_one_result_alone_is_that_of_plain_pytorch(used: int, device) -> None:
    x, residual, up = (rows(5, 40, seed=seed).to(device) for seed in range(3))
    leaves = [x.requires_grad_(), residual.requires_grad_(), torch.ones(40, device=device, requires_grad=True)]
    ours = rms_norm(leaves[0], leaves[2], 1e-6, residual=leaves[1])[used]
    theirs = reference.rms_norm(leaves[0], leaves[2], 1e-6, residual=leaves[1])[used]
    found = torch.autograd.grad((ours * up).sum(), leaves, allow_unused=True)
    expected = torch.autograd.grad((theirs * up).sum(), leaves, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hidden", [1, 63, 128, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_element_of_every_result_is_written(hidden: int, dtype: torch.dtype, device, poison) -> None:
    x, gate, residual = (rows(37, hidden, dtype=dtype, seed=i).to(device).requires_grad_() for i in range(3))
    weight = rows(hidden, seed=5).to(device).requires_grad_()
    with poison():
        y, total = rms_norm(x, weight, 1e-6, gate=gate, residual=residual)
        found = torch.autograd.grad(y.sum() + total.sum(), (x, weight, gate, residual))
    for tensor in (y, total, *found):
        assert not tensor.isnan().any()


def test_the_gradient_of_the_weight_is_the_same_every_time_and_sums_all_rows(device) -> None:
    x, up = rows(203, 128, seed=0).to(device), rows(203, 128, seed=1).to(device)
    weight = torch.ones(128, device=device, requires_grad=True)
    found = [torch.autograd.grad((rms_norm(x, weight, 1e-6) * up).sum(), (weight,))[0] for _ in range(2)]
    assert torch.equal(*found)
    normalized = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(found[0].double(), (normalized * up).sum(0), rtol=1e-5, atol=1e-5)


def test_a_frozen_weight_costs_no_gradient(device, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    backward = kernels.backward
    monkeypatch.setattr(kernels, "backward", lambda *args: asked.append(args[-1]) or backward(*args))
    for trained in (False, True):
        x = rows(3, 64).to(device).requires_grad_()
        weight = torch.ones(64, device=device, requires_grad=trained)
        rms_norm(x, weight, 1e-6).sum().backward()
        assert (weight.grad is not None) is trained
        assert x.grad is not None
    assert asked == [False, True]


def test_nan_and_infinity_make_their_row_nan_and_no_other(device) -> None:
    for bad in (math.nan, math.inf):
        x = rows(5, 64).to(device)
        x[2, 7] = bad
        found = rms_norm(x, None, 1e-6).isnan().any(-1)
        assert found.tolist() == [False, False, True, False, False]


def test_a_row_of_zeros_stays_zero(device) -> None:
    x = torch.zeros(2, 64, device=device, requires_grad=True)
    y = rms_norm(x, None, 1e-6)
    y.sum().backward()
    assert not y.any()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("extra", ["plain", "gate", "residual", "no weight"])
def test_the_operator_passes_opcheck(extra: str, device) -> None:
    x = rows(6, 40, dtype=torch.bfloat16).to(device).requires_grad_()
    other = rows(6, 40, dtype=torch.bfloat16, seed=1).to(device).requires_grad_()
    weight = None if extra == "no weight" else torch.ones(40, device=device, requires_grad=True)
    gate, residual = (other if extra == name else None for name in ("gate", "residual"))
    torch.library.opcheck(
        torch.ops.pegbox_kernels.rms_norm.default, (x, weight, gate, residual, 1e-6, 0.0, extra == "gate")
    )
    root = torch.ones(6, device=device)
    for trained in {False, weight is not None}:
        total, *saved = (None if part is None else part.detach() for part in (residual, x, weight, gate))
        arguments = (other.detach(), total, *saved, root, 0.0, False, trained)
        torch.library.opcheck(torch.ops.pegbox_kernels.rms_norm_backward.default, arguments)


def test_torch_compile_keeps_it_in_one_graph_with_the_same_gradient(device) -> None:
    x = rows(6, 48).to(device).requires_grad_()
    weight = torch.ones(48, device=device, requires_grad=True)

    def loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y, total = rms_norm(x * 2, weight, 1e-6, residual=x)
        return y.square().sum() + total.sum()

    expected = torch.autograd.grad(loss(x, weight), (x, weight))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x, weight), (x, weight)), expected)


def test_a_second_derivative_is_refused(device) -> None:
    x = rows(3, 16).to(device).requires_grad_()
    (gradient,) = torch.autograd.grad(rms_norm(x, None, 1e-6).sum(), (x,), create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_triton_the_reference_answers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    import pegbox_kernels.rms_norm as op

    results = []
    for uses_kernels in (True, False):
        monkeypatch.setattr(op, "runs_kernels", dispatch.runs_kernels if uses_kernels else lambda _: False)
        leaves = [rows(9, 300, dtype=dtype, seed=i).requires_grad_() for i in range(3)]
        weight = rows(300, seed=5).requires_grad_()
        y, total = rms_norm(leaves[0], weight, 1e-6, gate=leaves[1], residual=leaves[2])
        loss = (y * rows(9, 300, seed=6)).sum() + total.float().sum()
        results.append((y, total, *torch.autograd.grad(loss, (*leaves, weight))))
    slack = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(results[0], results[1], **slack)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(5)}, r"x \(3, 8\) and weight \(5,\): the weight must be \(8,\)"),
        ({"gate": torch.ones(3, 4)}, r"x \(3, 8\) and gate \(3, 4\) do not fit"),
        ({"residual": torch.ones(3, 8).half()}, r"x is torch.float32 and residual torch.float16"),
        ({"x": torch.ones(3, 8).double()}, r"x is torch.float64: .* Use x.float\(\)"),
        ({"x": torch.ones(1, 16385), "weight": None}, r"the last dimension must have 1 to 16384 numbers"),
        ({"x": torch.ones(3, 0), "weight": None}, r"the last dimension must have 1 to 16384 numbers"),
        ({"eps": -1e-6}, "eps is -1e-06"),
        ({"eps": math.nan}, "eps is nan"),
        ({"cast": "lama"}, "cast is 'lama': write 'llama'"),
        ({"weight": torch.ones(8, device="meta")}, "x lies on cpu and weight on meta"),
    ],
)
def test_a_wrong_argument_is_named_with_the_value_seen(change: dict, message: str) -> None:
    arguments = {"x": torch.ones(3, 8), "weight": torch.ones(8), "eps": 1e-6, **change}
    with pytest.raises(ValueError, match=message):
        rms_norm(**arguments)
