"""Best-fit decreasing bin packing in O(n) operations on small integers.

Rows are placed by falling length, each into the fullest bin that still has room for it (Johnson 1973; at most 11/9 of
the optimum, and for lengths of text, where short rows fill what long ones leave, a few bins above it). Open bins are
kept by the room they have: a stack of bins for each room, and one integer whose bit r says that some bin has room r.
The fullest bin with room for a row is then the lowest set bit at or above its length, without a search.

A bin that best fit leaves with much room costs little as long as many short rows follow; at the end of a window a
handful of bins stay partly empty, which is why windows are large.
"""

from __future__ import annotations

from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Positions of `lengths` in bins whose sums do not exceed `capacity`.

    Args:
        lengths: tokens of each row, each from 1 to `capacity`.
        capacity: tokens of a bin.

    Returns:
        Bins in the order of their first position; positions within a bin ascend.
    """
    stacks: list[list[list[int]]] = [[] for _ in range(capacity + 1)]
    bins: list[list[int]] = []
    rooms = 0
    for position in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[position]
        able = rooms >> length
        if able:
            room = length + (able & -able).bit_length() - 1
            stack = stacks[room]
            chosen = stack.pop()
            if not stack:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, []
            bins.append(chosen)
        chosen.append(position)
        left = room - length
        if left:
            if not stacks[left]:
                rooms |= 1 << left
            stacks[left].append(chosen)
    for chosen in bins:
        chosen.sort()
    bins.sort(key=lambda chosen: chosen[0])
    return bins
