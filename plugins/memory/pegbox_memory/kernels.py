"""Kernels of pegbox-kernels, where it is installed: they run as on a GPU but launch nothing, so scratch is counted."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pegbox.context import Context

NAMESPACE = "pegbox_kernels"
STAND_INS = {"gpt-oss-attention": ("backend", "window_backend"), "attention": ("implementation",)}
FOREIGN = ("auto", "flash-attn-4", "flex")
"""Attention that may be no operator of torch, which tensors without data cannot be given to."""


@contextmanager
def allocating() -> Iterator[None]:
    """Within it, operations of pegbox-kernels allocate what they would on a GPU."""
    if find_spec(NAMESPACE) is None:
        yield
        return
    from pegbox_kernels.allocating import allocating

    with allocating(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*data pointer of FakeTensor")
        yield


def attention(ctx: Context) -> tuple[tuple[str, ...], list[str]]:
    """Settings by which our own attention stands for others, and a note if one was asked for by name.

    All keep the same for their backward: queries, keys, values, the output, and one log-sum-exp a head and token.
    """
    sections = ctx.config.resolved()
    asked = {
        f"{plugin}.{key}": sections[plugin].get(key)
        for plugin, keys in STAND_INS.items()
        if plugin in sections and find_spec(NAMESPACE) is not None
        for key in keys
    }
    replaced = {key: value for key, value in asked.items() if value in FOREIGN}
    named = sorted({str(value) for value in replaced.values()} - {"auto"})
    notes = [f"attention by {' and '.join(named)} is counted as that of pegbox-kernels, which keeps the same"]
    return tuple(f"{key}=pegbox" for key in replaced), notes if named else []


def within(operator: Any) -> Callable[..., Any] | None:
    """The function of an operator of pegbox-kernels within `allocating`: it is run, and what it makes is counted."""
    if getattr(operator, "namespace", None) != NAMESPACE or f"{NAMESPACE}.allocating" not in sys.modules:
        return None
    from pegbox_kernels.allocating import within

    return within(operator)
