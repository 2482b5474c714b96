"""The loop over chunks of rows: logits by a matrix product, softmax in their place, products with their gradient.

One scratch buffer of at most `logits_bytes` holds the logits of a chunk, then their gradient. Chunks are as large as
it allows and of nearly equal size, in multiples of 128 rows, since each chunk of a trained head reads and writes the
fp32 gradient of the weight once (2.3 GB at H = 2880, V = 201088): 4 chunks cost 6 ms of traffic on an H100, 64 cost 99.

N  rows    C  rows of a chunk    H  hidden size    V  vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pegbox_kernels.dispatch import is_for_gpu

ROWS_UNITS = (128, 64, 32, 16, 1)
"""Chunks are multiples of the first that leaves at most an eighth of the budget: of tiles of a product, if possible."""
PITCH_BYTES = 128
"""Rows of the scratch buffer begin on multiples of it: a cache line."""


class Products(NamedTuple):
    """Operands in the dtype of the products, and what is made of them; None: not wanted.

    `dx_NH` is in the dtype of the operands or fp32, `dw_VH` and `db_V` are fp32; none need be initialized.
    """

    hidden_NH: Tensor
    weight_VH: Tensor
    dx_NH: Tensor | None = None
    dw_VH: Tensor | None = None
    db_V: Tensor | None = None

    @property
    def gradient(self) -> bool:
        return self.dx_NH is not None or self.dw_VH is not None or self.db_V is not None


Softmax = Callable[[Tensor, slice], None]
"""`softmax(logits_CV, rows)`: replace the logits of some rows by their gradient, if one is wanted."""


def run(products: Products, softmax: Softmax, logits_bytes: int, factors_N: Tensor | None = None) -> None:
    """All chunks; `factors_N`, which `softmax` fills, multiply rows of `dx_NH`, the only gradient there is then."""
    rows, vocab = products.hidden_NH.shape[0], products.weight_VH.shape[0]
    if not rows:
        for made in (products.dw_VH, products.db_V):
            if made is not None:
                made.zero_()
        return
    itemsize = products.hidden_NH.element_size()
    pitch = -(-vocab * itemsize // PITCH_BYTES) * PITCH_BYTES // itemsize
    sizes = chunk_sizes(rows, pitch * itemsize, logits_bytes)
    device = products.hidden_NH.device
    scratch = torch.empty(sizes[0] * pitch, dtype=products.hidden_NH.dtype, device=device).view(-1, pitch)[:, :vocab]
    with torch.autocast(device.type, enabled=False):
        start = 0
        for size in sizes:
            _chunk(products, softmax, scratch[:size], slice(start, start + size), factors_N, not start)
            start += size


def chunk_sizes(rows: int, row_bytes: int, logits_bytes: int) -> list[int]:
    """Rows of each chunk: within the budget (one row at least), nearly equal, the largest first.

    >>> chunk_sizes(16384, 201088 * 2, 880 << 20)
    [2048, 2048, 2048, 2048, 2048, 2048, 2048, 2048]
    """
    most = max(1, logits_bytes // row_bytes)
    unit = next(unit for unit in ROWS_UNITS if most // unit * unit * 8 >= most * 7)
    units = -(-rows // unit)
    count = -(-units // (most // unit))
    sizes = [(units // count + (index < units % count)) * unit for index in range(count)]
    sizes[-1] -= units * unit - rows
    return sizes


def _chunk(
    products: Products, softmax: Softmax, logits_CV: Tensor, rows: slice, factors_N: Tensor | None, first: bool
) -> None:
    hidden_CH = products.hidden_NH[rows]
    torch.mm(hidden_CH, products.weight_VH.T, out=logits_CV)
    softmax(logits_CV, rows)
    if products.dx_NH is not None:
        dx_CH = products.dx_NH[rows]
        _add_product(dx_CH, logits_CV, products.weight_VH, first=True)
        if factors_N is not None:
            dx_CH.mul_(factors_N[rows].unsqueeze(-1))
    if products.dw_VH is not None:
        _add_product(products.dw_VH, logits_CV.T, hidden_CH, first)
    if products.db_V is not None:
        summed_V = logits_CV.sum(0, dtype=torch.float32)
        products.db_V.copy_(summed_V) if first else products.db_V.add_(summed_V)


def _add_product(total: Tensor, one: Tensor, other: Tensor, first: bool) -> None:
    """`total` = or += one @ other; where it is fp32 and they are not, nothing is rounded between."""
    if one.dtype == total.dtype:
        torch.mm(one, other, out=total) if first else total.addmm_(one, other)
    elif not is_for_gpu(total):
        product = one.float() @ other.float()
        total.copy_(product) if first else total.add_(product)
    elif first:
        torch.mm(one, other, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, one, other, out_dtype=torch.float32, out=total)
