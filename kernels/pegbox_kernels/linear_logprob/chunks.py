"""The loop over chunks of rows: logits by a matrix product, softmax in their place, products with their gradient.

One scratch buffer of at most `logits_bytes` holds the logits of a chunk, then their gradient. Chunks are as large as
it allows and of nearly equal size, in multiples of 128 rows, since each chunk of a trained head reads and writes the
fp32 gradient of the weight once (2.3 GB at H = 2880, V = 201088): 4 chunks cost 6 ms of traffic on an H100, 64 cost 99.

Overlap: a chunk is cut in two pieces. The softmax of the first runs on a side stream beside the logits of the
second, that of the second beside dx of the first, so that no softmax is waited for and no second buffer is needed:

    main    logits 1 | logits 2  | dx 1      | dx 2 | dW of the chunk
    side             | softmax 1 | softmax 2 |

The side stream is joined before anything is freed, so the allocator may hand memory on at once; within a capture it
forks from the capturing stream and joins it again.

N  rows    C  rows of a chunk    H  hidden size    V  vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

ROWS_UNIT = 128
"""Rows of a tile of a matrix product: chunks are multiples of it."""
PITCH_BYTES = 128
"""Rows of the scratch buffer begin on multiples of it: a cache line."""
PIECES = 2
OVERLAP_BYTES = 128 << 20
"""Logits of a call from which an overlap pays for its events; below, the softmax takes microseconds."""


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


def run(products: Products, softmax: Softmax, logits_bytes: int, overlap: bool) -> None:
    """All chunks. `softmax` may be called with another stream current; what it writes is ready when this returns."""
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
    with torch.autocast(device.type, enabled=False), _lane(device, overlap) as lane:
        start = 0
        for size in sizes:
            _chunk(products, softmax, scratch, slice(start, start + size), lane, PIECES if overlap else 1, not start)
            start += size


def chunk_sizes(rows: int, row_bytes: int, logits_bytes: int) -> list[int]:
    """Rows of each chunk: within the budget (one row at least), nearly equal, the largest first.

    >>> chunk_sizes(16384, 201088 * 2, 880 << 20)
    [2048, 2048, 2048, 2048, 2048, 2048, 2048, 2048]
    """
    unit = next(unit for unit in (ROWS_UNIT, 16, 1) if unit * row_bytes <= logits_bytes or unit == 1)
    return _split(rows, unit, -(-rows // unit), max(1, logits_bytes // (unit * row_bytes)))


def _split(rows: int, unit: int, units: int, most: int) -> list[int]:
    """`rows`, in chunks of at most `most` units."""
    count = -(-units // most)
    sizes = [(units // count + (index < units % count)) * unit for index in range(count)]
    sizes[-1] -= units * unit - rows
    return sizes


def overlaps(rows: int, vocab: int, itemsize: int, device: torch.device) -> bool:
    """Whether softmax and products overlap by default: on a GPU, with enough to do and two pieces to do it in."""
    return device.type == "cuda" and rows > ROWS_UNIT and rows * vocab * itemsize >= OVERLAP_BYTES


def _chunk(
    products: Products, softmax: Softmax, scratch_CV: Tensor, rows: slice, lane: _Lane, pieces: int, first: bool
) -> None:
    size = rows.stop - rows.start
    units = -(-size // ROWS_UNIT)
    inside, done = _slices(_split(size, ROWS_UNIT, units, -(-units // pieces))), []
    for index, piece in enumerate(inside):
        lane.free(index)
        logits_CV, of_all = scratch_CV[piece], slice(rows.start + piece.start, rows.start + piece.stop)
        torch.mm(products.hidden_NH[of_all], products.weight_VH.T, out=logits_CV)
        lane.beside(index, lambda logits_CV=logits_CV, of_all=of_all: softmax(logits_CV, of_all))
        done.append(of_all)
    if not products.gradient:
        return
    for index, (piece, of_all) in enumerate(zip(inside, done, strict=True)):
        lane.free(index)
        if products.dx_NH is not None:
            _add_product(products.dx_NH[of_all], scratch_CV[piece], products.weight_VH, first=True)
    grad_CV = scratch_CV[:size]
    if products.dw_VH is not None:
        _add_product(products.dw_VH, grad_CV.T, products.hidden_NH[rows], first)
    if products.db_V is not None:
        summed_V = grad_CV.sum(0, dtype=torch.float32)
        products.db_V.copy_(summed_V) if first else products.db_V.add_(summed_V)


def _slices(sizes: list[int]) -> list[slice]:
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _add_product(total: Tensor, one: Tensor, other: Tensor, first: bool) -> None:
    """`total` = or += one @ other; where it is fp32 and they are not, nothing is rounded between."""
    if one.dtype == total.dtype:
        torch.mm(one, other, out=total) if first else total.addmm_(one, other)
    elif not total.is_cuda:
        product = one.float() @ other.float()
        total.copy_(product) if first else total.add_(product)
    elif first:
        torch.mm(one, other, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, one, other, out_dtype=torch.float32, out=total)


class _Lane:
    """Where softmax runs: in turn with the products."""

    def beside(self, piece: int, work: Callable[[], None]) -> None:
        """Run `work` on the piece, after everything so far."""
        work()

    def free(self, piece: int) -> None:
        """What follows may use the piece: its softmax is done."""


class _SideLane(_Lane):
    """Or on a stream of its own, of high priority: a multiprocessor that a product leaves takes a row first."""

    def __init__(self, device: torch.device) -> None:
        self.main = torch.cuda.current_stream(device)
        self.side = torch.cuda.Stream(device, priority=-1)
        self.done: dict[int, torch.cuda.Event] = {}

    def beside(self, piece: int, work: Callable[[], None]) -> None:
        self.side.wait_stream(self.main)
        with torch.cuda.stream(self.side):
            work()
        self.done[piece] = self.side.record_event()

    def free(self, piece: int) -> None:
        if piece in self.done:
            self.main.wait_event(self.done.pop(piece))


@contextmanager
def _lane(device: torch.device, overlap: bool) -> Iterator[_Lane]:
    if not overlap or device.type != "cuda":
        yield _Lane()
        return
    lane = _SideLane(device)
    try:
        yield lane
    finally:
        lane.main.wait_stream(lane.side)
