"""How many layers may keep everything, and how many what attention returned, within a number of bytes.

What a step needs is described by what one was seen to need:

    need = fixed + working + sum over layers of what they keep

`fixed` lies in memory before a forward, `working` is the most that a forward and backward adds with every layer
computed again. Keeping a layer adds at most what it keeps, wherever in the step the peak is, so the sum is an upper
bound. All but `fixed` belongs to a shape, and is carried to others so that it stays one: copies of weights are the same
for any shape; the rest grows in proportion to tokens; what holds a number for each pair of tokens grows with the length
of rows as well, and is not taken to shrink with it. `working` is not taken to shrink at all, because a part of it does
not.

Attention goes first, because it saves the most time for a byte. Layers are taken from the last one on: the backward
begins with it, and what it kept is gone before the first layer is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Of a micro-batch: all its tokens, and those of one row."""

    tokens: int
    row: int


@dataclass(frozen=True)
class LayerBytes:
    """What one layer keeps for the backward beyond its inputs, in bytes.

    Attributes:
        weights: copies of its weights in another data type.
        tokens: what grows with tokens.
        pairs: what has a number for each pair of tokens of a row.
        attention: what its attention returned.
    """

    weights: int = 0
    tokens: int = 0
    pairs: int = 0
    attention: int = 0


@dataclass(frozen=True)
class Measured:
    """What a step was seen to need at one shape, in bytes; `layers` in the order of the forward."""

    shape: Shape
    fixed: int
    working: int
    layers: tuple[LayerBytes, ...]

    def whole(self, index: int, shape: Shape) -> float:
        """What a layer keeps that is not computed again."""
        layer, tokens = self.layers[index], shape.tokens / self.shape.tokens
        return layer.weights + layer.tokens * tokens + layer.pairs * tokens * self._longer(shape)

    def attention(self, index: int, shape: Shape) -> float:
        """What a layer keeps that is computed again but for its attention."""
        return self.layers[index].attention * shape.tokens / self.shape.tokens

    def base(self, shape: Shape) -> float:
        """What is needed with every layer computed again."""
        pairs = any(layer.pairs for layer in self.layers)
        return self.fixed + self.working * max(1.0, shape.tokens / self.shape.tokens) * (
            self._longer(shape) if pairs else 1.0
        )

    def need(self, choice: Choice, shape: Shape) -> float:
        """What is needed with a choice."""
        count = len(self.layers)
        first_whole, first_attention = count - choice.whole, count - choice.whole - choice.attention
        kept = sum(self.whole(index, shape) for index in range(first_whole, count))
        return self.base(shape) + kept + sum(self.attention(i, shape) for i in range(first_attention, first_whole))

    def _longer(self, shape: Shape) -> float:
        return max(1.0, shape.row / self.shape.row)


@dataclass(frozen=True)
class Choice:
    """The last `whole` layers keep everything, the `attention` layers before them what attention returned."""

    whole: int = 0
    attention: int = 0

    def kind(self, index: int, count: int) -> str:
        """What layer `index` of `count` keeps: `whole`, `attention` or `inputs`."""
        from_end = count - index
        if from_end <= self.whole:
            return "whole"
        return "attention" if from_end <= self.whole + self.attention else "inputs"


def choose(measured: Measured, limit: float, shape: Shape, *, attention: bool = True) -> Choice:
    """The most that fits into `limit` bytes for a micro-batch of this shape.

    Args:
        measured: what a step was seen to need.
        limit: bytes.
        shape: of the micro-batch.
        attention: whether layers may keep what attention returned.
    """
    count = len(measured.layers)
    room = limit - measured.base(shape)
    last_first = range(count - 1, -1, -1)
    small = [measured.attention(index, shape) if attention else 0.0 for index in range(count)]
    with_attention = _fitting([small[index] for index in last_first], room) if any(small) else 0
    room -= sum(small[index] for index in last_first[:with_attention])
    # A layer that keeps everything keeps what attention returned already.
    more = [
        measured.whole(index, shape) - (small[index] if count - index <= with_attention else 0.0)
        for index in last_first
    ]
    whole = _fitting(more, room)
    return Choice(whole, max(with_attention - whole, 0))


def _fitting(sizes: Sequence[float], room: float) -> int:
    """How many of the first sizes fit together."""
    for count, size in enumerate(sizes):
        room -= size
        if room < 0:
            return count
    return len(sizes)
