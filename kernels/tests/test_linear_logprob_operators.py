"""The operators of a linear head: opcheck, torch.compile, second backwards, and errors that name what was seen."""

from __future__ import annotations

import math

import pytest
import torch
from pegbox_kernels.linear_logprob import linear_cross_entropy, linear_token_logprobs

N, H, V = 6, 24, 123
RULE = (1.0, 2.0, 0.9, -100)
COST = (torch.float32, 1 << 20)


def head(dtype: torch.dtype = torch.float32, frozen: bool = False):
    """Hidden states, weight, targets; the first two are leaves unless the weight is frozen."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).to(dtype)
    weight = (torch.randn(V, H, generator=generator) / 3).to(dtype)
    targets = torch.randint(V, (N,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(not frozen), targets


def moved(device, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.detach().to(device).requires_grad_(tensor.requires_grad) for tensor in tensors]


@pytest.mark.parametrize("ahead", [False, True])
def test_the_operator_of_logps_passes_opcheck(ahead: bool, device) -> None:
    hidden, weight, targets = moved(device, *head())
    bias = torch.zeros(V, device=device, requires_grad=True)
    arguments = (hidden, weight, bias, targets, *RULE, *COST, True, ahead, ahead, ahead)
    torch.library.opcheck(torch.ops.pegbox_kernels.linear_logps.default, arguments)


def test_the_operators_of_loss_and_backward_pass_opcheck(device) -> None:
    hidden, weight, targets = moved(device, *head())
    for bias in (None, torch.zeros(V, device=device, requires_grad=True)):
        arguments = (hidden, weight, bias, targets, *RULE, *COST, None, 0.1, 0.01, True, True, bias is not None)
        torch.library.opcheck(torch.ops.pegbox_kernels.linear_nll.default, arguments)
    frozen = (hidden.detach(), weight.detach(), None, targets)
    _, entropy, _, parts, *_ = torch.ops.pegbox_kernels.linear_logps(*frozen, *RULE, *COST, True, False, False, False)
    grads = [torch.ones(N, device=device) for _ in range(3)]
    saved = (*frozen, parts, entropy, *grads, *RULE, *COST, True, True, False)
    torch.library.opcheck(torch.ops.pegbox_kernels.linear_logps_backward.default, saved)
    scaled = (hidden.detach(), grads[0])
    torch.library.opcheck(torch.ops.pegbox_kernels.scale_rows.default, (*scaled, torch.bfloat16))
    torch.library.opcheck(torch.ops.pegbox_kernels.scale_rows_.default, scaled)


@pytest.mark.parametrize("uniform", [False, True])
def test_torch_compile_keeps_it_in_one_graph_with_the_same_gradient(uniform: bool, device) -> None:
    hidden, weight, targets = moved(device, *head())

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        found = linear_token_logprobs(x * 2, w, targets, uniform=uniform)
        return -found.logps.sum() + linear_cross_entropy(x, w, targets, label_smoothing=0.1).loss_sum

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(hidden, weight), (hidden, weight)), expected)


def test_a_second_derivative_is_refused(device) -> None:
    hidden, weight, targets = moved(device, *head(frozen=True))
    found = linear_token_logprobs(hidden, weight, targets)
    (grad,) = torch.autograd.grad((found.logps.square().sum(),), (hidden,), create_graph=True)
    with pytest.raises(RuntimeError):
        grad.square().sum().backward()


def test_a_second_backward_is_right_or_refused_never_wrong(device) -> None:
    """The kept gradient of an fp32 weight is scaled where it lies, which is too large to copy."""
    for dtype in (torch.bfloat16, torch.float32):
        hidden, weight, targets = moved(device, *head(dtype=dtype))
        loss = linear_cross_entropy(hidden, weight, targets).loss_sum
        first = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
        if dtype == torch.float32:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(3 * loss, (hidden, weight))
        else:
            torch.testing.assert_close(torch.autograd.grad(3 * loss, (hidden, weight)), first)


def test_only_what_is_trained_gets_a_gradient(device) -> None:
    hidden, weight, targets = moved(device, *head())
    bias = torch.zeros(V, device=device, requires_grad=True)
    expected = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, targets, bias_V=bias).loss_sum, (hidden, weight, bias)
    )
    for index, leaf in enumerate((hidden, weight, bias)):
        inputs = [other.detach() for other in (hidden, weight, bias)]
        inputs[index] = leaf
        for uniform in (False, True):
            found = linear_token_logprobs(*inputs[:2], targets, bias_V=inputs[2], uniform=uniform)
            (grad,) = torch.autograd.grad(-found.logps.sum(), (leaf,))
            torch.testing.assert_close(grad, expected[index])


def test_ids_of_32_bits_are_the_same_ids(device) -> None:
    hidden, weight, targets = moved(device, *head())
    found = linear_token_logprobs(hidden, weight, targets.int())
    torch.testing.assert_close(found.logps, linear_token_logprobs(hidden, weight, targets).logps)


def test_nan_in_a_hidden_state_is_not_swallowed(device) -> None:
    hidden, weight, targets = moved(device, *head())
    with torch.no_grad():
        hidden[2, 3] = math.nan
    found = linear_token_logprobs(hidden, weight, targets, entropy=True)
    for tensor in (found.logps, found.entropy, found.logsumexp):
        assert tensor.isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_NH": torch.zeros(2, 3, H)}, "Flatten the leading dimensions"),
        ({"targets_N": torch.zeros(5).long()}, "one target for each row"),
        ({"weight_VH": torch.zeros(V, H + 1)}, r"weight \(123, 25\) .* do not fit"),
        ({"bias_V": torch.zeros(V + 1)}, r"bias \(124,\) does not fit"),
        ({"targets_N": torch.zeros(N)}, "targets are torch.float32"),
        ({"targets_N": torch.full((N,), V)}, "target 123 is outside the vocabulary of 123"),
        ({"targets_N": torch.zeros(N, dtype=torch.long, device="meta")}, "cpu and meta"),
        ({"weight_VH": torch.zeros(V, H, dtype=torch.bfloat16)}, "outside of autocast they must have one dtype"),
        ({"hidden_NH": torch.zeros(N, H).double()}, "float64: it must be bf16, fp16 or fp32"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"logits_bytes": 0}, "logits_bytes is 0"),
    ],
)
def test_a_wrong_argument_is_named_with_the_value_seen(change: dict, message: str) -> None:
    hidden, weight, targets = head()
    given = {"hidden_NH": hidden, "weight_VH": weight, "targets_N": targets, **change}
    for operation in (linear_token_logprobs, linear_cross_entropy):
        with pytest.raises(ValueError, match=message):
            operation(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"z_loss": -1.0}, "z_loss is -1.0"),
        ({"token_weights_N": torch.ones(5)}, "one floating-point weight per row"),
        ({"token_weights_N": torch.ones(N, requires_grad=True)}, "need a gradient, which is not computed"),
    ],
)
def test_a_wrong_objective_is_named_with_the_value_seen(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*head(), **change)
