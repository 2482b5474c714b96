"""Kernels of short windows, under every kind of launch: agreement with fp64, same bits, nothing left unwritten.

On a GPU as it is, else in the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from pegbox_kernels.attention import kernels, reference
from pegbox_kernels.attention.window_backward import Columns
from pegbox_kernels.attention.window_forward import Rows, back
from torch import Tensor

BFLOAT = 0.008
"""Rounding of half precision: of the result, of P and of dS, relative to the largest value."""

ROWS = Rows(32, 2, 2, 4, 1)
LAUNCHES = {
    "two heads, tiles of 64": (ROWS, Columns(64, 64, 4, 1)),
    "four heads, tiles of 32": (Rows(16, 4, 1, 4, 1), Columns(64, 32, 4, 1)),
    "four bundles": (Rows(16, 2, 4, 4, 1), Columns(64, 64, 4, 1)),
}


class Case:
    """One call: its inputs, what it returns, and what fp64 does."""

    def __init__(
        self,
        device: torch.device,
        lengths: tuple[int, ...],
        heads: tuple[int, int] = (4, 1),
        head_dim: int = 64,
        window: int = 128,
        sinks: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        packed: bool = True,
    ) -> None:
        tokens, generator = sum(lengths), torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        sizes = [(tokens, count, head_dim) for count in (heads[0], heads[1], heads[1], heads[0])]
        self.q, self.k, self.v, self.dout = (normal(*size).to(dtype) for size in sizes)
        self.sinks, self.dlse = normal(heads[0]) if sinks else None, normal(heads[0], tokens)
        self.borders = torch.tensor((0, *lengths)).cumsum(0).int().to(device)
        self.table = kernels.make_table(self.borders, tokens) if packed else None
        self.shape = kernels.Shape(
            tokens=tokens,
            heads=heads[0],
            kv_heads=heads[1],
            head_dim=head_dim,
            dtype=dtype,
            scale=head_dim**-0.5,
            causal=True,
            window=window,
        )

    def run(self, rows: Rows, columns: Columns) -> tuple[Tensor, ...]:
        """Outputs, lse, and gradients of q, k, v and sinks."""
        tile = kernels.Tile(64, 1, 64, 4, 1)
        short = kernels.Short(rows.fitted(self.shape), rows.fitted(self.shape), columns)
        launch = kernels.Launch(forward=tile, queries=tile, keys=tile, way="ordered", short=short)
        out, lse = kernels.forward(self.q, self.k, self.v, self.sinks, self.table, self.shape, launch)
        saved = kernels.Saved(
            q=self.q,
            k=self.k,
            v=self.v,
            sinks=self.sinks,
            out=out,
            lse=lse,
            dout=self.dout,
            dlse=self.dlse,
            table=self.table,
        )
        gradients = kernels.backward(saved, self.shape, launch)
        return out, lse, *(gradient for gradient in gradients if gradient is not None)

    def expected(self) -> tuple[Tensor, ...]:
        q, k, v, dout, dlse = (tensor.double() for tensor in (self.q, self.k, self.v, self.dout, self.dlse))
        sinks = None if self.sinks is None else self.sinks.double()
        options = (self.shape.scale, True, self.shape.window)
        out, lse = reference.attention(q, k, v, sinks, self.borders, *options)
        gradients = reference.attention_backward(q, k, v, sinks, self.borders, out, lse, dout, dlse, *options)
        return out, lse, *(gradient for gradient in gradients if gradient is not None)


def worst(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest error of any tensor, relative to its largest value; NaN where one is."""
    assert len(found) == len(expected)
    pairs = zip(found, expected, strict=True)
    return torch.stack([(a.double() - b).abs().max() / b.abs().max().clamp(min=1e-9) for a, b in pairs]).max().item()


Poison = Callable[[], AbstractContextManager[None]]


@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
def test_documents_are_apart_and_everything_is_written(
    launch: tuple[Rows, Columns], device: torch.device, poison: Poison
) -> None:
    case = Case(device, (70, 1, 0, 190, 5), window=128)
    with poison():
        found = case.run(*launch)
    assert worst(found, case.expected()) < BFLOAT


@pytest.mark.parametrize("window", [1, 2, 33, 64, 65, 127, 129])
def test_windows_end_where_they_should(window: int, device: torch.device, poison: Poison) -> None:
    """With values of one token the outputs show which keys are seen: too many or too few is a gross error."""
    case = Case(device, (200,), (2, 1), 16, window=window, packed=False)
    with poison():
        found = case.run(ROWS, Columns(64, 32, 4, 1))
    # The gradient of sinks with a window of 1 is a small difference of large terms.
    assert worst(found[:5], case.expected()[:5]) < BFLOAT


@pytest.mark.parametrize("heads", [(3, 1), (2, 2), (12, 2)])
def test_groups_of_any_size(heads: tuple[int, int], device: torch.device, poison: Poison) -> None:
    case = Case(device, (90,), heads, 32)
    with poison():
        found = case.run(ROWS, Columns(64, 64, 4, 1))
    assert worst(found, case.expected()) < BFLOAT


@pytest.mark.parametrize("head_dim", [3, 40])
def test_head_dim_needs_not_be_a_power_of_two(head_dim: int, device: torch.device, poison: Poison) -> None:
    case = Case(device, (33, 60), (4, 2), head_dim, 100, sinks=False, dtype=torch.float16)
    with poison():
        found = case.run(ROWS, Columns(64, 64, 4, 1))
    assert worst(found, case.expected()) < BFLOAT


def test_a_document_has_the_same_bits_alone_and_packed_and_again(device: torch.device) -> None:
    packed, alone = Case(device, (45, 150), (2, 1), sinks=False), Case(device, (150,), (2, 1), sinks=False)
    for name in ("q", "k", "v", "dout"):
        setattr(alone, name, getattr(packed, name)[45:].clone())
    alone.dlse = packed.dlse[:, 45:].contiguous()
    launch = LAUNCHES["four heads, tiles of 32"]
    of_packed, of_alone, again = packed.run(*launch), alone.run(*launch), alone.run(*launch)
    of_packed = tuple(tensor[:, 45:] if i == 1 else tensor[45:] for i, tensor in enumerate(of_packed))
    for first, second, third in zip(of_packed, of_alone, again, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(second, third)


def test_a_tile_before_the_tokens_holds_every_key_that_the_first_one_sees() -> None:
    for window in range(1, 130):
        assert back(window) >= window - 1


def test_launches_fit_any_group() -> None:
    shape = Case(torch.device("cpu"), (1,), (6, 1), packed=False).shape
    assert Rows(32, 2, 4, 4, 1).fitted(shape) == Rows(32, 2, 3, 4, 1)
    assert Rows(8, 8, 1, 4, 1).fitted(shape) == Rows(32, 2, 1, 4, 1)
