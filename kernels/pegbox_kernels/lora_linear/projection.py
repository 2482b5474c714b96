"""One frozen projection and its low-rank update, and what a group of them that share an input is made of.

T  tokens    K  inputs    N  outputs    r  rank of one update    R  ranks of a group together
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pegbox_kernels.dispatch import is_for_gpu

Weight = Tensor | Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Projection:
    """x W^T + bias + scale (drop(x) A^T) B^T, and with a magnitude DoRA's rescaling of it.

    Attributes:
        weight: (N, K), frozen; or a function that makes it, called once forward and once backward (a base that is kept
            packed: what it makes is never kept).
        a, b: (r, K) and (N, r), usually fp32; both None: no update.
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
        bias: (N,), frozen or trained.
        dropout: probability that an element of x is dropped before A; draws a mask of its own from torch's generator.
        magnitude: (N,), DoRA's; the norm it is divided by gets no gradient (arXiv:2402.09353, section 4.3).
    """

    weight: Weight
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    bias: Tensor | None = None
    dropout: float = 0.0
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]


def check(x: Tensor, projection: Projection, name: str) -> None:
    """Raise ValueError unless shapes fit and the weight is frozen."""
    a, b, inputs = projection.a, projection.b, x.shape[-1]
    if (a is None) != (b is None):
        raise ValueError(f"{name} has {'b but no a' if a is None else 'a but no b'}: an update needs both, or neither.")
    if isinstance(projection.weight, Tensor):
        weight = projection.weight
        if weight.ndim != 2 or weight.shape[1] != inputs:
            raise ValueError(f"{name}: weight {tuple(weight.shape)} does not take x {tuple(x.shape)}: it is (N, K).")
        if weight.requires_grad:
            raise ValueError(
                f"{name}: the weight wants a gradient, and none is computed: the base is frozen. Pass "
                "weight.detach() or call requires_grad_(False); to train it, use torch.nn.functional.linear."
            )
        if b is not None and b.shape[0] != weight.shape[0]:
            raise ValueError(f"{name}: b {tuple(b.shape)} does not fit weight {tuple(weight.shape)}: it is (N, r).")
    if a is not None and b is not None and (a.ndim, b.ndim, a.shape[-1], a.shape[0]) != (2, 2, inputs, b.shape[-1]):
        raise ValueError(
            f"{name}: a {tuple(a.shape)} and b {tuple(b.shape)} do not fit x {tuple(x.shape)}: "
            "they must be (r, K) and (N, r)."
        )
    if not 0 <= projection.dropout < 1:
        raise ValueError(f"{name}: dropout is {projection.dropout}; it is a probability below 1.")
    if a is None and (projection.dropout or projection.magnitude is not None):
        raise ValueError(f"{name} has dropout or a magnitude, but no update: neither would do anything.")
    if projection.dropout and projection.magnitude is not None:
        raise ValueError(f"{name}: dropout together with a magnitude (DoRA) is not computed here. Drop one.")


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for its device; some (meta) know none."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype inside autocast, else that of x."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Within it nothing is cast: everything is in the right dtype already."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


class Factors(NamedTuple):
    """The small matrices of a group in the dtype of the computation; a (R, K) stacks those of all updates."""

    a: Tensor
    b: tuple[Tensor | None, ...]
    columns: tuple[slice, ...]


def factors(a: Sequence[Tensor | None], b: Sequence[Tensor | None], x: Tensor) -> Factors:
    """Cast to the dtype of x, all in two launches, with the A of the group below each other."""
    columns, end = [], 0
    for part in a:
        rank = 0 if part is None else part.shape[0]
        columns.append(slice(end, end + rank))
        end += rank
    known = [part for part in (*a, *b) if part is not None]
    if not known:
        return Factors(x.new_empty(0, x.shape[1]), (None,) * len(b), tuple(columns))
    cast = torch.cat([part.reshape(-1) for part in known]).to(x.dtype)
    stacked, *rest = cast.split([end * x.shape[1], *(part.numel() for part in b if part is not None)])
    views = iter(rest)
    each = tuple(None if part is None else next(views).view(part.shape) for part in b)
    return Factors(stacked.view(end, x.shape[1]), each, tuple(columns))


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """|W + s B A| of each row, (N,) in fp32, without B A: |w|^2 + 2 s b (A w) + s^2 b (A A^T) b^T."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    # What is multiplied is what the forward multiplies: factors rounded to its dtype.
    a_wide, b_wide = a.to(weight.dtype).to(wide), b.to(weight.dtype).to(wide)
    square = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
    cross = (mm_wide(weight, a.to(weight.dtype).T) * b_wide).sum(1)
    own = ((b_wide @ (a_wide @ a_wide.T)) * b_wide).sum(1)
    return (square + 2 * scale * cross + scale * scale * own).clamp_min_(0).sqrt_()


def mm_wide(one: Tensor, other: Tensor) -> Tensor:
    """Their product summed and returned in fp32 (fp64 of fp64)."""
    if one.dtype in (torch.float32, torch.float64):
        return one @ other
    if is_for_gpu(one):
        return torch.mm(one, other, out_dtype=torch.float32)
    return one.float() @ other.float()
