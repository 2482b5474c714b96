"""Gated linear units as models compute them, their gradients, and what autograd and compile make of them.

Agreement with the reference over shapes, layouts and dtypes is in test_parity.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from pegbox_kernels import dispatch
from pegbox_kernels.glu import glu, kernels, parts, reference

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "clamped")
LAYOUTS = ("apart", "halves", "interleaved")


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(spread).to(dtype)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_it_is_that_of_transformers(name: str, device) -> None:
    activations = pytest.importorskip("transformers.activations")
    gate, up = numbers(4, 100).to(device), numbers(4, 100, seed=1).to(device)
    activation = {"gelu_pytorch_tanh": "gelu_tanh"}.get(name, name)
    torch.testing.assert_close(
        glu(gate, up, activation=activation), activations.ACT2FN[name](gate) * up, rtol=1e-5, atol=1e-5
    )


def test_clamped_it_is_that_of_gpt_oss(device) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = transformers.GptOssConfig(hidden_size=8, intermediate_size=8, num_local_experts=2)
    experts = GptOssExperts(config)
    gate_up = numbers(40, 16, spread=8.0).to(device).requires_grad_()
    expected = experts._apply_gate(gate_up)
    found = glu(gate_up, layout="interleaved", activation="clamped", alpha=experts.alpha, limit=experts.limit)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    up = numbers(40, 8, seed=4).to(device)
    torch.testing.assert_close(
        torch.autograd.grad(found, (gate_up,), up), torch.autograd.grad(expected, (gate_up,), up), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_tensor_gives_what_two_give(activation: str, device) -> None:
    gate_up = numbers(6, 80).to(device)
    for layout in ("halves", "interleaved"):
        gate, up = (part.contiguous() for part in parts(gate_up, layout))
        packed = gate_up.clone().requires_grad_()
        gate.requires_grad_(), up.requires_grad_()
        one, two = glu(packed, layout=layout, activation=activation), glu(gate, up, activation=activation)
        torch.testing.assert_close(one, two, rtol=0, atol=0)
        (found,) = torch.autograd.grad(one.sum(), (packed,))
        torch.testing.assert_close(parts(found, layout), torch.autograd.grad(two.sum(), (gate, up)), rtol=0, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradient_is_the_finite_difference_of_the_value(activation: str) -> None:
    """In fp64, without autograd; the numbers lie on both sides of every clamp and on none."""
    gate = torch.linspace(-9.3, 9.1, 47, dtype=torch.float64)
    up = torch.linspace(8.9, -9.2, 47, dtype=torch.float64)
    grads = reference.glu_backward(torch.ones_like(gate), gate, up, activation, 1.702, 7.0)
    for index, gradient in enumerate(grads):
        step = torch.full_like(gate, 1e-6)
        steps = (step, 0.0) if index == 0 else (0.0, step)
        above = reference.glu(gate + steps[0], up + steps[1], activation)
        below = reference.glu(gate - steps[0], up - steps[1], activation)
        torch.testing.assert_close(gradient, (above - below) / 2e-6, rtol=1e-6, atol=1e-7)


def test_what_was_clamped_has_no_gradient_and_the_limit_itself_has_one(device) -> None:
    gate = torch.tensor([7.0, 7.5, -9.0], device=device, requires_grad=True)
    up = torch.tensor([-7.0, 7.5, -7.5], device=device, requires_grad=True)
    grads = torch.autograd.grad(glu(gate, up, activation="clamped").sum(), (gate, up))
    assert [gradient.ne(0).tolist() for gradient in grads] == [[True, False, True], [True, False, False]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", [1, 63, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_element_of_every_result_is_written(
    layout: str, columns: int, dtype: torch.dtype, device, poison
) -> None:
    leaves = [numbers(5, columns, dtype=dtype, seed=i).to(device).requires_grad_() for i in range(2)]
    if layout != "apart":
        leaves = [numbers(5, 2 * columns, dtype=dtype).to(device).requires_grad_()]
    with poison():
        y = glu(*leaves, layout="halves" if layout == "apart" else layout)
        found = torch.autograd.grad(y.sum(), leaves)
    for tensor in (y, *found):
        assert not tensor.isnan().any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_is_not_swallowed(activation: str, device) -> None:
    for place in (0, 1):
        both = [numbers(3, 8).to(device) for _ in range(2)]
        both[place][1, 2] = math.nan
        found = glu(*both, activation=activation).isnan()
        assert found.nonzero().tolist() == [[1, 2]]


def test_the_result_in_half_precision_is_rounded_once(device) -> None:
    gate, up = (
        numbers(64, 64, dtype=torch.bfloat16).to(device),
        numbers(64, 64, dtype=torch.bfloat16, seed=1).to(device),
    )
    exact = reference.glu(gate.double(), up.double(), "silu")
    torch.testing.assert_close(glu(gate, up), exact.to(torch.bfloat16), rtol=2**-8, atol=1e-30)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operator_passes_opcheck(layout: str, device) -> None:
    gate = numbers(6, 40, dtype=torch.bfloat16).to(device).requires_grad_()
    up = numbers(6, 40, dtype=torch.bfloat16, seed=1).to(device).requires_grad_() if layout == "apart" else None
    kind = ("halves" if layout == "apart" else layout, "clamped", 1.702, 7.0)
    torch.library.opcheck(torch.ops.pegbox_kernels.glu.default, (gate, up, *kind))
    grad = numbers(6, 40 if layout == "apart" else 20, dtype=torch.bfloat16).to(device)
    saved = (grad, gate.detach(), None if up is None else up.detach())
    torch.library.opcheck(torch.ops.pegbox_kernels.glu_backward.default, (*saved, *kind))


def test_torch_compile_keeps_it_in_one_graph_with_the_same_gradient(device) -> None:
    x, weight = numbers(5, 16).to(device), numbers(48, 16, seed=1, spread=0.3).to(device).requires_grad_()

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return glu(x @ weight.T, activation="gelu_tanh").square().sum()

    expected = torch.autograd.grad(loss(weight), (weight,))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(weight), (weight,)), expected)


def test_a_second_derivative_is_refused(device) -> None:
    gate = numbers(3, 16).to(device).requires_grad_()
    (gradient,) = torch.autograd.grad(glu(gate).sum(), (gate,), create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_triton_the_reference_answers(layout: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import pegbox_kernels.glu as op

    assert kernels is not None
    results = []
    for uses_kernels in (True, False):
        monkeypatch.setattr(op, "runs_kernels", dispatch.runs_kernels if uses_kernels else lambda _: False)
        leaves = [numbers(6, 34, seed=i).requires_grad_() for i in range(2 if layout == "apart" else 1)]
        y = glu(*leaves, layout="halves" if layout == "apart" else layout, activation=activation)
        results.append((y, *torch.autograd.grad(y.pow(2).sum(), leaves)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "activation is 'relu': write one of silu, gelu, gelu_tanh, clamped"),
        ({"layout": "rows"}, "layout is 'rows': write one of halves, interleaved"),
        ({"up": torch.ones(3, 7)}, r"gate \(3, 8\) and up \(3, 7\) do not fit"),
        ({"up": torch.ones(3, 8).half()}, "gate is torch.float32 on cpu, up torch.float16 on cpu"),
        ({"gate": torch.ones(3, 7), "up": None}, r"gate \(3, 7\) holds gate and up: its last dimension must be even"),
        ({"layout": "interleaved"}, "but gate and up are two tensors"),
        ({"gate": torch.ones(3, 8).double(), "up": None}, "gate is torch.float64"),
        ({"limit": 0.0}, "limit 0.0: both must be above 0"),
        ({"gate": torch.ones(3, 0), "up": None}, "needs a last dimension"),
    ],
)
def test_a_wrong_argument_is_named_with_the_value_seen(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        glu(**{"gate": torch.ones(3, 8), "up": torch.ones(3, 8), **change})
