"""The backward of Hopper: when it is taken, what it writes beside products, and on such a GPU its gradients.

What it keeps of each row is computed by a kernel that the interpreter knows; its products run on Hopper only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import pytest
import torch
from pegbox_kernels.allocating import allocating
from pegbox_kernels.attention import attention, kernels, reference
from pegbox_kernels.harness.parity import error
from torch import Tensor

if kernels is None or kernels.hopper is None:
    pytest.skip("needs Triton with Gluon", allow_module_level=True)
from pegbox_kernels.attention import hopper_backward

Poison = Callable[[], AbstractContextManager[None]]
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


def shape_of(tokens: int, heads: int = 4, kv_heads: int = 2, head_dim: int = 64, **change) -> kernels.Shape:
    shape = kernels.Shape(
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        scale=head_dim**-0.5,
        causal=True,
        window=None,
    )
    return replace(shape, **change)


def normal(*size: int, device: torch.device, behind: int = 0, seed: int = 0) -> Tensor:
    """Numbers in a larger tensor that has NaN after them."""
    found = torch.full((size[0] + behind, *size[1:]), torch.nan, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    found[: size[0]] = torch.randn(size, generator=generator, device=device)
    return found[: size[0]]


@dataclass(frozen=True)
class Case:
    """A call forward: what its backward reads, with NaN after the last token of what is read by tiles."""

    saved: kernels.Saved
    shape: kernels.Shape

    @classmethod
    def of(cls, shape: kernels.Shape, device: torch.device, sinks: bool = True) -> Case:
        tokens, heads, kv_heads, width = shape.tokens, shape.heads, shape.kv_heads, shape.head_dim
        behind = normal(tokens, 2 * heads + 2 * kv_heads, width, device=device, behind=200).to(shape.dtype)
        q, k, v, dout = behind.split((heads, kv_heads, kv_heads, heads), 1)
        sink = normal(heads, device=device, seed=1)
        out, lse = reference.attention(*(t.float() for t in (q, k, v)), sink, None, shape.scale, shape.causal, None)
        dlse = normal(heads, tokens, device=device, seed=2)
        saved = kernels.Saved(
            q=q,
            k=k,
            v=v,
            sinks=sink if sinks else None,
            out=out.to(shape.dtype).contiguous(),
            lse=lse.contiguous(),
            dout=dout,
            dlse=dlse,
            table=None,
        )
        return cls(saved, shape)

    def backward(self, launch: kernels.Launch) -> tuple[Tensor, ...]:
        return tuple(gradient for gradient in kernels.backward(self.saved, self.shape, launch) if gradient is not None)

    def expected(self) -> tuple[Tensor, ...]:
        """In fp64, from the outputs in fp64."""
        given = self.saved
        q, k, v, dout, dlse = (tensor.double() for tensor in (given.q, given.k, given.v, given.dout, given.dlse))
        sinks = normal(self.shape.heads, device=q.device, seed=1).double()
        options = (self.shape.scale, self.shape.causal, None)
        out, lse = reference.attention(q, k, v, sinks, None, *options)
        trained = None if given.sinks is None else sinks
        gradients = reference.attention_backward(q, k, v, trained, None, out, lse, dout, dlse, *options)
        return tuple(gradient for gradient in gradients if gradient is not None)


def test_it_is_taken_for_one_long_document_unless_the_same_bits_are_asked_for() -> None:
    with allocating():
        for head_dim in (64, 128):
            shape = shape_of(kernels.MANY, head_dim=head_dim)
            assert kernels.default_launch(shape, False).gather == kernels.GATHERS[head_dim]
            assert kernels.default_launch(shape, False).crew == kernels.CREWS[head_dim]
            assert kernels.default_launch(shape, True).gather is None
            assert kernels.default_launch(shape, True).crew == kernels.CREWS[head_dim]
        for change in ({"tokens": kernels.MANY - 1}, {"window": 1000}, {"head_dim": 96}, {"dtype": torch.float32}):
            launch = kernels.default_launch(replace(shape_of(kernels.MANY), **change), False)
            assert launch.gather is None
            assert launch.crew is None


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("tokens", [1, 64, 65, 127, 130, 200])
def test_what_it_keeps_of_each_row_ends_in_zeros_at_a_whole_tile(
    tokens: int, head_dim: int, device: torch.device, poison: Poison
) -> None:
    """Whole tiles: TMA reads from multiples of four numbers only, whatever the number of tokens."""
    shape, gather = shape_of(tokens, 3, 1, head_dim), kernels.GATHERS[head_dim]
    saved = Case.of(shape, device).saved
    rows = hopper_backward.rows_of(shape, gather)
    assert rows % gather.tokens == 0 <= rows - tokens < gather.tokens
    with poison():
        stats = torch.empty(2, 3, rows, device=device)
        dsinks = hopper_backward.keep_statistics(saved, stats, shape).sum(1)
    delta = (saved.dout.float() * saved.out.float()).sum(-1).T - saved.dlse
    share = -(torch.exp(saved.sinks[:, None] - saved.lse) * delta).sum(1)
    torch.testing.assert_close(stats[0, :, :tokens], saved.lse * 1.4426950408889634, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats[1, :, :tokens], delta, rtol=1e-4, atol=1e-4)
    assert torch.equal(stats[:, :, tokens:], torch.zeros_like(stats[:, :, tokens:]))
    torch.testing.assert_close(dsinks, share, rtol=1e-4, atol=1e-4)
    frozen = hopper_backward.keep_statistics(saved._replace(sinks=None), stats, shape)
    assert frozen.shape == (3, 0)


@pytest.mark.slow
def test_it_compiles_for_hopper() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pegbox_kernels.harness.compiled", "attention", "--only", "causal 8192", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [kernel for kernel in json.loads(done.stdout) if kernel["kernel"] == "hopper_backward_kernel"]
    assert {kernel["constants"]["D"] for kernel in found} == {64, 128}
    assert all(kernel["products"].get("wgmma") for kernel in found)


TOKENS = (1, 3, 63, 65, 128, 129, 777, 918, 1000, 1023, 4097)
"""Remainders by 4 of every kind, documents shorter than a tile, and tiles of one token."""


@on_hopper
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(64, 6, 2), (128, 3, 1)])
@pytest.mark.parametrize("tokens", TOKENS)
def test_it_is_as_exact_as_the_ordered_way(
    tokens: int, head_dim: int, heads: int, kv_heads: int, causal: bool, device: torch.device, poison: Poison
) -> None:
    """What stands after the last token is NaN, and so is new memory."""
    compare(shape_of(tokens, heads, kv_heads, head_dim, causal=causal), device, poison)


@on_hopper
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(64, 16, 2), (128, 4, 4)])
def test_fp16_groups_of_eight_and_of_one_and_frozen_sinks(
    head_dim: int, heads: int, kv_heads: int, trained: bool, device: torch.device, poison: Poison
) -> None:
    compare(shape_of(1111, heads, kv_heads, head_dim, dtype=torch.float16), device, poison, trained)


def compare(shape: kernels.Shape, device: torch.device, poison: Poison, trained: bool = True) -> None:
    case, ordered = Case.of(shape, device, trained), replace(kernels.default_launch(shape, True), crew=None)
    gather = kernels.GATHERS[shape.head_dim]
    assert hopper_backward.fits(case.saved, shape, gather)
    with poison():
        found = case.backward(replace(ordered, gather=gather))
    truth, other = case.expected(), case.backward(ordered)
    assert len(found) == len(truth) == (4 if trained else 3)
    for name, ours, theirs, right in zip(("dq", "dk", "dv", "dsinks"), found, other, truth, strict=False):
        assert error(ours, right) <= 2 * error(theirs, right) + 1e-5, name


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("more", [0, 1, 2, 3])
def test_the_operation_takes_it_and_deterministic_gives_the_same_bits_again(
    more: int, head_dim: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, keys and values are slices of one projection."""
    tokens, calls, backward = kernels.MANY + more, [], hopper_backward.backward
    monkeypatch.setattr(hopper_backward, "backward", lambda *given: calls.append(1) or backward(*given))
    fused = normal(tokens, 5, head_dim, device=device, behind=70).to(torch.bfloat16)
    sinks, dout = normal(3, device=device, seed=1), normal(tokens, 3, head_dim, device=device, seed=2).bfloat16()

    def gradients(deterministic: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
        exact = dtype == torch.float64
        leaf = fused.detach().to(dtype).requires_grad_()
        sink = (sinks.double() if exact else sinks.clone()).requires_grad_()
        parts = leaf.split((3, 1, 1), 1)
        if exact:
            out, lse = reference.attention(*parts, sink, None, head_dim**-0.5, True, None)
        else:
            out, lse = attention(*parts, sinks_H=sink, deterministic=deterministic)
        return torch.autograd.grad((out * dout.to(dtype)).sum() + 0.1 * lse.square().sum(), (leaf, sink))

    same = gradients(True), gradients(True)
    assert not calls
    found = gradients(False)
    assert calls == [1]
    for first, second, ours, right in zip(*same, found, gradients(False, torch.float64), strict=True):
        assert torch.equal(first, second)
        assert error(ours, right) <= 2 * error(first, right) + 1e-5
