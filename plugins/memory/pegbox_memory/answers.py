"""What fake tensors answer where torch has no rule for it.

A question for a value (`.item()`, `if tensor:`) is answered: a condition is false, a number is 1. Grouped matrix
products, with which mixtures of experts are computed, have a rule for bfloat16 on some devices only; the shape of their
result does not depend on either.

    G  groups    M, N, K  rows, columns and the size that is summed over
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NOT_ONE = {torch.bool: False}


def value(tensor: Tensor) -> bool | int:
    """Of a single element."""
    return NOT_ONE.get(tensor.dtype, 1)


def grouped_product(
    left: Tensor,
    right: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The result of `_grouped_mm`: (M, K) x (G, K, N), (G, M, K) x (K, N), (M, K) x (K, N) by K, or all in groups."""
    rows, columns = left.shape[-2], right.shape[-1]
    if left.ndim == right.ndim == 2:
        assert offs is not None, "two matrices are divided by offsets"
        shape: tuple[int, ...] = (offs.shape[0], rows, columns)
    else:
        shape = (left.shape[0], rows, columns) if left.ndim == right.ndim else (rows, columns)
    return torch.empty(shape, dtype=out_dtype or left.dtype, device=left.device)


def wide_product(left: Tensor, right: Tensor, out_dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """`mm` of low precision that returns a wider one; torch has it for GPUs only."""
    shape = (left.shape[0], right.shape[1])
    return torch.empty(shape, dtype=out_dtype, device=left.device) if out is None else out


def wide_sum(
    total: Tensor,
    left: Tensor,
    right: Tensor,
    out_dtype: torch.dtype,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor | None = None,
) -> Tensor:
    """`addmm` of the same kind."""
    return wide_product(left, right, out_dtype, out=out)


RULES: dict[Any, Callable[..., Any]] = {torch.ops.aten._local_scalar_dense.default: value}
if hasattr(torch.ops.aten, "_grouped_mm"):
    RULES[torch.ops.aten._grouped_mm.default] = grouped_product
for name, product in (("mm", wide_product), ("addmm", wide_sum)):
    for overload in ("dtype", "dtype_out"):
        if overload in getattr(torch.ops.aten, name).overloads():
            RULES[getattr(getattr(torch.ops.aten, name), overload)] = product
