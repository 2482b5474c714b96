"""Log-probabilities and entropy: what they are, their edges, and what autograd and compile make of them.

Agreement with the reference over shapes, layouts and dtypes is in test_parity.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from pegbox_kernels import dispatch
from pegbox_kernels.logprob import kernels, reference, token_logprobs

V = 123


def rows(count: int = 6, vocab: int = V, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, vocab, generator=generator).mul(3).to(dtype)
    return logits, torch.randint(vocab, (count,), generator=generator)


def on(device: torch.device, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(device) for tensor in tensors]


def test_they_are_those_of_torch_distributions(device) -> None:
    logits, targets = on(device, *rows())
    found = token_logprobs(logits, targets, temperature=0.6, entropy=True)
    truth = torch.distributions.Categorical(logits=logits.double() / 0.6)
    torch.testing.assert_close(found.logps.double(), truth.log_prob(targets), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.entropy.double(), truth.entropy(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.logsumexp.double(), (logits.double() / 0.6).logsumexp(-1))


def test_equal_logits_give_the_logarithm_of_the_vocabulary(device) -> None:
    logits = torch.full((2, 1000), 7.5, device=device, dtype=torch.bfloat16)
    found = token_logprobs(logits, torch.tensor([0, 999], device=device), entropy=True)
    torch.testing.assert_close(found.entropy.cpu(), torch.full((2,), math.log(1000)))
    torch.testing.assert_close(found.logps.cpu(), torch.full((2,), -math.log(1000)))


def test_a_small_entropy_is_not_lost_beside_large_logits(device) -> None:
    """lse - sum p z would leave rounding errors of 1e4 x 6e-8; truth is about 1e-5."""
    logits = torch.full((1, 64), 1e4, device=device)
    logits[0, 3] += 16.0
    found = token_logprobs(logits, torch.tensor([3], device=device), entropy=True)
    truth = torch.distributions.Categorical(logits=logits.double()).entropy()
    assert truth.item() < 2e-4
    torch.testing.assert_close(found.entropy.double(), truth, rtol=2e-3, atol=1e-7)


def test_the_gradient_of_a_row_sums_to_zero_because_a_shift_of_logits_changes_nothing(device) -> None:
    logits, targets = on(device, *rows(vocab=5000))
    logits.requires_grad_()
    found = token_logprobs(logits, targets, temperature=1.3, entropy=True)
    (grad,) = torch.autograd.grad((found.logps.sum() + found.entropy.square().sum(),), (logits,))
    assert grad.abs().max() > 0.1
    torch.testing.assert_close(grad.double().sum(-1).cpu(), torch.zeros(6).double(), rtol=0, atol=1e-5)


def test_the_gradient_is_the_finite_difference_of_the_value() -> None:
    """In fp64, of each output by itself, without autograd."""
    logits, targets = rows(count=1, vocab=9)
    logits = logits.double()
    parts = reference.softmax_parts(logits, 0.7)
    logps, entropy, _ = reference.token_logprobs(logits, targets, 0.7, -100, True)
    for index in range(3):
        grads = [torch.zeros_like(logps) for _ in range(3)]
        grads[index] += 1.0
        by_hand = reference.token_logprobs_backward(logits, targets, parts, entropy, tuple(grads), 0.7, -100)
        for column in range(9):
            step = torch.zeros_like(logits)
            step[0, column] = 1e-5
            above = reference.token_logprobs(logits + step, targets, 0.7, -100, True)[index]
            below = reference.token_logprobs(logits - step, targets, 0.7, -100, True)[index]
            assert by_hand[0, column].item() == pytest.approx(((above - below) / 2e-5).item(), abs=1e-8)


def test_the_reference_passes_gradcheck_in_fp64() -> None:
    logits, targets = rows(count=3, vocab=7)
    targets[1] = -100

    def outputs(z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(reference.token_logprobs(z, targets, 0.8, -100, True))

    assert torch.autograd.gradcheck(outputs, logits.double().requires_grad_())


def test_the_formula_of_the_gradient_equals_autograd_of_the_reference_with_masked_logits() -> None:
    logits, targets = rows(vocab=50)
    logits = logits.double()
    logits[:, 10:30] = -math.inf
    targets.clamp_(max=9)
    targets[2] = -100
    logits.requires_grad_()
    outputs = reference.token_logprobs(logits, targets, 0.9, -100, True)
    grads = tuple(torch.randn(6, dtype=torch.float64) for _ in range(3))
    (autograd,) = torch.autograd.grad(outputs, (logits,), grads)
    with torch.no_grad():
        parts = reference.softmax_parts(logits, 0.9)
        by_hand = reference.token_logprobs_backward(logits, targets, parts, outputs[1], grads, 0.9, -100)
    torch.testing.assert_close(by_hand, autograd)
    assert by_hand.isfinite().all()


@pytest.mark.parametrize("vocab", [1, 63, 1000, 4099])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_element_of_every_result_is_written(vocab: int, dtype: torch.dtype, device, poison) -> None:
    logits, targets = on(device, *rows(vocab=vocab, dtype=dtype))
    targets[3] = -100
    logits = logits.unflatten(0, (2, 3))[:, :2].requires_grad_()
    targets = targets.unflatten(0, (2, 3))[:, :2]
    with poison():
        assert torch.empty(3, device=device).isnan().all()
        found = token_logprobs(logits, targets, entropy=True)
        (grad,) = torch.autograd.grad(found.logps.sum() + found.entropy.sum(), (logits,))
    for tensor in (*found, grad):
        assert not tensor.isnan().any()


def test_a_row_that_is_ignored_is_zero_and_is_not_read(device) -> None:
    logits, targets = on(device, *rows())
    targets[1] = -100
    logits[1] = math.nan
    logits.requires_grad_()
    found = token_logprobs(logits, targets, entropy=True)
    (grad,) = torch.autograd.grad(sum(output.sum() for output in found), (logits,))
    assert [output[1].item() for output in found] == [0.0, 0.0, 0.0]
    assert torch.equal(grad[1], torch.zeros_like(grad[1]))
    assert grad.isfinite().all()


def test_another_ignore_index_makes_minus_100_a_mistake() -> None:
    logits, targets = rows()
    targets[0] = 0
    found = token_logprobs(logits, targets, ignore_index=0)
    assert found.logps[0] == 0.0
    targets[1] = -100
    with pytest.raises(ValueError, match="target -100 is outside the vocabulary of 123"):
        token_logprobs(logits, targets, ignore_index=0)


def test_nan_and_plus_infinity_in_the_logits_are_not_swallowed(device) -> None:
    for bad in (math.nan, math.inf):
        logits, targets = on(device, *rows(vocab=9000))
        logits[2, 8123] = bad
        found = token_logprobs(logits, targets, entropy=True)
        assert found.logps.isnan().tolist() == [False, False, True, False, False, False]
        assert found.entropy.isnan().tolist() == [False, False, True, False, False, False]


def test_the_lowest_finite_logits_of_a_mask_count_for_nothing(device) -> None:
    logits, targets = on(device, *rows(vocab=9000))
    targets %= 100
    finite, infinite = logits.clone(), logits.clone()
    finite[:, 100:] = torch.finfo(torch.float32).min
    infinite[:, 100:] = -math.inf
    ours = token_logprobs(finite, targets, entropy=True)
    for found, expected in zip(ours, token_logprobs(infinite, targets, entropy=True), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_in_place_equals_the_gradient_and_lies_in_the_logits(dtype: torch.dtype, device) -> None:
    logits, targets = on(device, *rows(vocab=1001, dtype=dtype))
    results = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        used = leaf * 1.0
        view = used.unflatten(0, (2, 3))[:, :-1]
        found = token_logprobs(view, targets.unflatten(0, (2, 3))[:, :-1], entropy=True, inplace_backward=inplace)
        (found.logps.sum() - 0.1 * found.entropy.sum()).backward()
        results.append(leaf.grad)
        with torch.no_grad():
            kept = torch.equal(used, logits)
        assert kept is not inplace
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_a_gradient_in_place_is_refused_by_autograd_where_the_logits_are_needed_again(device) -> None:
    logits, targets = on(device, *rows())
    used = logits.requires_grad_() * 1.0
    squared = used.square().sum()
    found = token_logprobs(used, targets, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (found.logps.sum() + squared).backward()


def test_a_gradient_in_place_is_refused_for_leaves_and_expanded_rows(device) -> None:
    logits, targets = on(device, *rows())
    with pytest.raises(ValueError, match="leaf"):
        token_logprobs(logits.requires_grad_(), targets, inplace_backward=True)
    expanded = (logits[:1] * 1.0).expand(6, -1)
    with pytest.raises(ValueError, match="share memory"):
        token_logprobs(expanded, targets, inplace_backward=True)


def test_a_second_derivative_is_refused(device) -> None:
    logits, targets = on(device, *rows())
    found = token_logprobs(logits.requires_grad_(), targets)
    (grad,) = torch.autograd.grad(found.logps.sum(), (logits,), create_graph=True)
    with pytest.raises(RuntimeError):
        grad.square().sum().backward()


@pytest.mark.parametrize("entropy", [False, True])
def test_the_operator_passes_opcheck(entropy: bool, device) -> None:
    logits, targets = on(device, *rows(dtype=torch.bfloat16))
    targets[0] = -100
    arguments = (logits.requires_grad_(), targets, 0.7, -100, entropy, False)
    torch.library.opcheck(torch.ops.pegbox_kernels.token_logprobs.default, arguments)
    _, entropies, _, parts = torch.ops.pegbox_kernels.token_logprobs(*arguments)
    saved = (targets, parts, entropies.detach(), *(torch.ones(6, device=device) for _ in range(3)), 0.7, -100)
    for operator in ("token_logprobs_backward", "token_logprobs_backward_"):
        call = getattr(torch.ops.pegbox_kernels, operator).default
        torch.library.opcheck(call, (logits.detach().clone(), *saved))


@pytest.mark.parametrize("inplace", [False, True])
def test_torch_compile_keeps_it_in_one_graph_with_the_same_gradient(inplace: bool, device) -> None:
    hidden = torch.randn(6, 16, device=device)
    head = torch.randn(V, 16, device=device, requires_grad=True)
    _, targets = on(device, *rows())

    def loss(weight: torch.Tensor) -> torch.Tensor:
        found = token_logprobs(hidden @ weight.T, targets, entropy=True, inplace_backward=inplace)
        return -found.logps.sum() - 0.01 * found.entropy.sum()

    expected = torch.autograd.grad(loss(head), (head,))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(head), (head,)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(5, dtype=torch.long)}, r"logits \(6, 123\) and targets \(5,\) do not fit"),
        ({"logits": torch.zeros(2, 7, 5), "targets": torch.zeros(2, 6).long()}, r"logits\[:, :-1\]"),
        (
            {"logits": torch.zeros(6, V, dtype=torch.float64)},
            "float64: the kernels compute bf16, fp16 and fp32",
        ),
        ({"targets": torch.zeros(6)}, r"targets are torch.float32: ids must be .* targets.long\(\)"),
        ({"temperature": 0.0}, "temperature is 0.0: .* take argmax"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"logits": torch.zeros(6, 0)}, "logits need a vocabulary"),
        ({"targets": torch.full((6,), V)}, "target 123 is outside the vocabulary of 123 .* tokenizer"),
        ({"targets": torch.zeros(6, dtype=torch.long, device="meta")}, "cpu and targets on meta"),
    ],
)
def test_a_wrong_argument_is_named_with_the_value_seen(change: dict, message: str) -> None:
    logits, targets = rows()
    with pytest.raises(ValueError, match=message):
        token_logprobs(**{"logits": logits, "targets": targets, **change})


def test_without_triton_the_reference_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine with neither GPU nor interpreter computes: the same numbers, by plain PyTorch."""
    logits, targets = rows(vocab=1000, dtype=torch.bfloat16)
    targets[2] = -100
    results = []
    for there in (True, False):
        monkeypatch.setattr(dispatch, "TRITON", there)
        leaf = logits.clone().requires_grad_()
        found = token_logprobs(leaf, targets, temperature=0.8, entropy=True)
        (grad,) = torch.autograd.grad(found.logps.sum() + found.entropy.sum(), (leaf,))
        results.append((*found, grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-2, atol=1e-5)


def test_rows_are_described_without_a_copy_by_two_strides() -> None:
    logits = torch.empty(2, 5, 7, 11)
    assert kernels.rows_of(logits) == kernels.Rows(70, 70, 0, 11, 1)
    assert kernels.rows_of(logits[:, :, :-1]) == kernels.Rows(60, 6, 77, 11, 1)
    assert kernels.rows_of(logits[:, :-1]) == kernels.Rows(56, 28, 385, 11, 1)
    assert kernels.rows_of(logits[:, ::2, ::3]) is None
