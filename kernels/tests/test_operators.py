"""An operation is the same where torch follows it, as a registered operator, and where only autograd does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pegbox_kernels.attention import attention
from pegbox_kernels.glu import glu
from pegbox_kernels.logprob import token_logprobs
from pegbox_kernels.operators import operator, unobserved
from pegbox_kernels.rms_norm import rms_norm
from pegbox_kernels.rope import rope
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _attention(x: Tensor) -> Tensor:
    out, lse = attention(x, x[:, :2], x[:, 2:], sinks_H=x[0, :, 0], window=5)
    return out.sum() + lse.square().sum()


def _rms_norm(x: Tensor) -> Tensor:
    y, total = rms_norm(x, x[0, 0], 1e-6, residual=x.cos())
    return y.square().sum() + total.sum()


def _rope(x: Tensor) -> Tensor:
    angles = normal(1, 6, 16, seed=1).to(x.device)
    q, k = rope(x[None].transpose(1, 2), x[None, :, :2].transpose(1, 2), angles.cos(), angles.sin())
    return q.square().sum() + k.exp().sum()


def _token_logprobs(x: Tensor) -> Tensor:
    found = token_logprobs(x[:, 0], torch.arange(6, device=x.device), entropy=True)
    return found.logps.sum() + found.logsumexp.square().sum()


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": _attention,
    "rms_norm": _rms_norm,
    "rope": _rope,
    "glu": lambda x: glu(x, x.cos(), activation="gelu_tanh").sum(),
    "token_logprobs": _token_logprobs,
}
every = pytest.mark.parametrize("name", OPERATIONS)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "pegbox_kernels":
            self.names.append(func._schema.name.rpartition("::")[2])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def x(device: torch.device) -> Tensor:
    return normal(6, 4, 16).to(device).requires_grad_()


@pytest.fixture(autouse=True)
def _plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is the way to the computation, not the computation."""
    from pegbox_kernels import dispatch

    monkeypatch.setattr(dispatch._Mode, "interpreting", False)


@every
def test_a_dispatch_mode_sees_the_operator_and_its_backward_and_changes_no_bit(name: str, x: Tensor) -> None:
    value = OPERATIONS[name](x)
    expected = value, *torch.autograd.grad(value, (x,))
    with Seen() as seen:
        value = OPERATIONS[name](x)
        found = value, *torch.autograd.grad(value, (x,))
    assert seen.names == [name, "rope" if name == "rope" else f"{name}_backward"]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@every
def test_without_anybody_to_see_it_no_operator_is_called(name: str, x: Tensor) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        OPERATIONS[name](x).backward()
    assert not [event.name for event in profile.events() if "pegbox_kernels::" in event.name]


@every
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_values_are_the_same(name: str, mode: Any, x: Tensor) -> None:
    expected = OPERATIONS[name](x)
    with mode():
        found = OPERATIONS[name](x.detach())
    assert torch.equal(found, expected)
    assert not found.requires_grad


@every
def test_saved_tensors_pass_through_hooks(name: str, x: Tensor) -> None:
    (expected,) = torch.autograd.grad(OPERATIONS[name](x), (x,))
    kept = []

    def pack(tensor: Tensor) -> int:
        kept.append(tensor.detach().clone())
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda place: kept[place]):
        value = OPERATIONS[name](x)
    assert torch.equal(torch.autograd.grad(value, (x,))[0], expected)


@every
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_the_same_gradient(name: str, reentrant: bool, x: Tensor) -> None:
    (expected,) = torch.autograd.grad(OPERATIONS[name](x), (x,))
    checkpoint(OPERATIONS[name], x, use_reentrant=reentrant).backward()
    assert torch.equal(x.grad, expected)


def test_selective_checkpointing_keeps_attention_and_computes_the_rest_again(x: Tensor) -> None:
    def loss(x: Tensor) -> Tensor:
        return _attention(rms_norm(x, None, 1e-6))

    def policy(ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = func is torch.ops.pegbox_kernels.attention.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    (expected,) = torch.autograd.grad(loss(x), (x,))
    with Seen() as seen:
        value = checkpoint(
            loss, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
        )
        value.backward()
    assert torch.equal(x.grad, expected)
    assert seen.names.count("attention") == 1
    assert seen.names.count("rms_norm") == 2


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "rope"])
def test_a_second_derivative_is_refused(name: str, x: Tensor) -> None:
    (grad,) = torch.autograd.grad(OPERATIONS[name](x), (x,), create_graph=True)
    with pytest.raises(RuntimeError):
        grad.square().sum().backward()


def test_a_second_derivative_of_a_rotation_is_exact(device: torch.device) -> None:
    given = normal(6, 4, 16, seed=3).to(device).requires_grad_()
    (grad,) = torch.autograd.grad(_rope(given), (given,), create_graph=True)
    (found,) = torch.autograd.grad(grad.sum(), (given,))
    step = 1e-2
    up, down = (torch.autograd.grad(_rope(given + sign * step), (given,))[0] for sign in (1, -1))
    torch.testing.assert_close(found.sum(), ((up - down) / (2 * step)).sum(), rtol=1e-2, atol=1e-2)


@every
def test_functorch_is_answered_as_by_any_registered_operator(name: str, x: Tensor) -> None:
    with pytest.raises(RuntimeError):
        torch.func.grad(OPERATIONS[name])(x.detach())


@every
def test_fake_tensors_get_fake_results(name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    with mode:
        given = torch.empty(6, 4, 16, requires_grad=True)
        value = OPERATIONS[name](given) if name != "rope" else given.sum()
    assert isinstance(value, torch._subclasses.FakeTensor)
    assert not unobserved((given,))


def test_memory_that_is_written_in_place_is_known_to_autograd(device: torch.device) -> None:
    logits = normal(3, 8).to(device).requires_grad_().mul(1.0)
    squared = logits.square().sum()
    found = token_logprobs(logits, torch.tensor([1, 2, 3], device=device), inplace_backward=True)
    found.logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


def test_an_operator_that_writes_raises_the_version_of_what_it_writes() -> None:
    def fill(target: Tensor, source: Tensor) -> None:
        target.numpy()[:] = source.numpy()

    write = operator(
        "written_in_a_test",
        fill,
        lambda target, source: None,
        schema="(Tensor(a!) target, Tensor source) -> ()",
        mutates=("target",),
    )
    target, source = torch.zeros(2), torch.ones(2)
    write(target, source)
    assert target.tolist() == [1.0, 1.0]
    assert (target._version, source._version) == (1, 0)


def test_subclasses_symbols_and_meta_tensors_go_to_the_registered_operator() -> None:
    class Own(Tensor):
        pass

    plain = torch.zeros(2)
    assert unobserved((plain, torch.nn.Parameter(plain), None, 1, 1.0, True, "halves"))
    assert not unobserved((plain, plain.as_subclass(Own)))
    assert not unobserved((torch.zeros(2, device="meta"),))
