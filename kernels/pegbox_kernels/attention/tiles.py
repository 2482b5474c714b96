"""What the attention kernels share: where a block of tokens lies, which keys it sees, loads, products, rounding.

A block never crosses the border of a document. Documents are cut into granules of GRANULE tokens from their own first
token on, and a program finds its granule in a table of (first token, begin of the document, end of the document). No
count of granules is needed on the host: document i owns the slots from borders[i] // GRANULE + i on, which are enough
for its ceil(length / GRANULE) granules, and tokens // GRANULE + documents slots hold all of them; a slot without tokens
begins at or after the end of its document, and its programs leave at once. Cuts being relative to the document, a
document gives the same bits alone and in a packed batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pegbox_kernels.launching import repeatable

GRANULE = tl.constexpr(256)
"""Tokens of a granule: every block of tokens divides it."""
# Whether Triton's interpreter runs the kernels: TRITON_INTERPRET=1 was set when this module was imported.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Below every score, and finite: the maximum of no scores, so that exp2(-inf - maximum) is 0 and not NaN.
LOWEST = tl.constexpr(-1e30)


@repeatable
@triton.jit
def table_kernel(borders, table, documents, slots, rounds, BLOCK: tl.constexpr):
    """Fills table (2, slots, 4): granules as queries take them (late ones first) and as keys do (early ones first)."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.int32)
    high = tl.zeros([BLOCK], tl.int32) + documents - 1
    for _ in range(rounds):
        middle = (low + high + 1) // 2
        before = tl.load(borders + middle) // GRANULE + middle <= slot
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    begin = tl.load(borders + low)
    end = tl.load(borders + low + 1)
    start = begin + (slot - begin // GRANULE - low) * GRANULE
    inside = slot < slots
    _enter(table + (slots - 1 - slot) * 4, start, begin, end, inside)
    _enter(table + (slots + slot) * 4, start, begin, end, inside)


@triton.jit
def _enter(entry, start, begin, end, inside):
    tl.store(entry, start, mask=inside)
    tl.store(entry + 1, begin, mask=inside)
    tl.store(entry + 2, end, mask=inside)
    tl.store(entry + 3, tl.zeros_like(start), mask=inside)


@triton.jit
def locate(table, index, blocks, tokens, TABLE: tl.constexpr, BLOCK: tl.constexpr, LATE_FIRST: tl.constexpr):
    """First token of a block, and the begin and end of its document; the block holds nothing if it is at the end."""
    if TABLE:
        parts: tl.constexpr = GRANULE // BLOCK
        part = index % parts
        if LATE_FIRST:
            part = parts - 1 - part
        entry = table + (index // parts) * 4
        start = tl.load(entry) + part * BLOCK
        begin = tl.load(entry + 1)
        end = tl.load(entry + 2)
    else:
        if LATE_FIRST:
            index = blocks - 1 - index
        start = index * BLOCK
        begin = 0
        end = tokens
    return start, begin, end


@triton.jit
def wide(number):
    """A count in 64 bits; the interpreter has plain Python numbers for the index of a loop."""
    return tl.full([], 0, tl.int64) + number


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    """In another dtype, to nearest even, as a GPU does by itself; the interpreter truncates to bf16."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = value.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        value = tl.where(value != value, value, rounded)
    return value.to(DTYPE)


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """a @ b + total in fp32; the interpreter cannot multiply bf16."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def load_rows(base, offsets, rows, end, columns, D: tl.constexpr, MASKED: tl.constexpr):
    """A tile; rows from `end` on (where MASKED) and columns from D on are zero.

    Offsets within a tile fit 32 bits (the host sees to it), which saves registers; `base` has the 64-bit part.
    """
    pointers = base + offsets
    WIDE: tl.constexpr = columns.shape[0] != D
    if MASKED:
        if WIDE:
            tile = tl.load(pointers, mask=(rows < end)[:, None] & (columns < D)[None, :], other=0.0)
        else:
            tile = tl.load(pointers, mask=(rows < end)[:, None], other=0.0)
    elif WIDE:
        tile = tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(base, offsets, tile, rows, end, columns, D: tl.constexpr):
    """The rows before `end` of a tile, in the dtype of the pointer."""
    inside = (rows < end)[:, None] & (columns < D)[None, :]
    tl.store(base + offsets, narrow(tile, base.dtype.element_ty), mask=inside)


@triton.jit
def offsets_of(rows, stride, columns):
    """Within a tile whose rows lie `stride` apart."""
    return rows[:, None] * stride + columns[None, :]


@triton.jit
def is_seen(queries, keys, end, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Whether tokens `queries` see tokens `keys` (shapes that broadcast); queries lie before the end."""
    seen = (keys <= queries) if CAUSAL else (keys < end)
    if WINDOWED:
        seen = seen & (keys > queries - window)
    return seen


@triton.jit
def key_range(
    start, begin, end, window, TOKENS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Tiles of KEYS keys for TOKENS queries from `start` on: (first, left, clear, stop).

    From `left` to `clear` every query sees every key; from `first` to `left` the window ends, from `clear` to `stop`
    are the diagonal and the end of the document. MASKED: no tile is taken to be clear.
    """
    first = begin
    stop = end
    clear = end
    if CAUSAL:
        stop = tl.minimum(end, start + TOKENS)
        clear = tl.minimum(end, start + 1)
    if WINDOWED:
        first = begin + tl.maximum(start - begin - window + 1, 0) // 16 * 16
    clear = first + tl.maximum(clear - first, 0) // KEYS * KEYS
    left = first
    if WINDOWED:
        hidden = tl.maximum(start + TOKENS - window - first, 0)
        left = tl.minimum(first + (hidden + KEYS - 1) // KEYS * KEYS, clear)
    if MASKED:
        left = clear
    return first, left, clear, stop


@triton.jit
def query_range(
    start, begin, end, window, KEYS: tl.constexpr, TOKENS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Tiles of TOKENS queries for KEYS keys from `start` on: (first, clear, last, stop).

    From `clear` to `last` every query sees every key; before is the diagonal, after the edge of the window or the
    end of the document. MASKED: no tile is taken to be clear.
    """
    first = begin
    stop = end
    clear = first
    if CAUSAL:
        first = start
        clear = start + (KEYS - 1 + TOKENS - 1) // TOKENS * TOKENS
    last = end
    if WINDOWED:
        stop = tl.minimum(end, start + KEYS - 1 + window)
        last = tl.minimum(end, start + window)
    if start + KEYS > end:
        # Keys after the end must be masked for every query.
        last = first
    clear = tl.minimum(clear, first + (stop - first) // TOKENS * TOKENS)
    last = clear + tl.maximum(last - clear, 0) // TOKENS * TOKENS
    if MASKED:
        last = clear
    return first, clear, last, stop


@triton.jit
def two_runs(low, gap, resume, high, TILE: tl.constexpr):
    """How many tiles lie from `low` to `gap` (whole ones), and how many with those from `resume` to `high`."""
    before = (gap - low) // TILE
    return before, before + (high - resume + TILE - 1) // TILE


@triton.jit
def of_bundle(row, stride_t, stride_h, columns, HEADS: tl.constexpr):
    """Offsets of rows that are HEADS heads of each token."""
    return ((row // HEADS) * stride_t + (row % HEADS) * stride_h)[:, None] + columns[None, :]
