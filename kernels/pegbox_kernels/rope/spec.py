"""The record of the operation: what its tests compare and its benchmark measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from pegbox_kernels.harness.opspec import Cost, Inputs, Make, OpSpec, Outputs, Sample, Workload, short_of_memory
from pegbox_kernels.rope import reference, rope

Layout = Callable[[Tensor], Tensor]


def _make(
    rows: int,
    tokens: int,
    heads: tuple[int, int],
    dim: int,
    *,
    rotary: int | None = None,
    per_pair: bool = False,
    interleaved: bool = False,
    heads_dim: int = 1,
    table_rows: int = 1,
    scale: float = 1.0,
    tables: torch.dtype | None = None,
    unlike: bool = False,
    layout: Layout | None = None,
    together: Layout | None = None,
) -> Make:
    """Normal queries and keys as a projection leaves them, and tables; `unlike`: other angles for both of a pair.

    `layout` is that of either, `together` that of their heads beside each other.
    """

    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(tokens + dim)

        def projected(count: int) -> Tensor:
            size = (rows, tokens, count, dim)
            made = torch.randn(size, generator=generator, dtype=torch.float32, device=device).to(dtype)
            return layout(made) if layout else made

        turned = dim if rotary is None else rotary
        width = turned if unlike else turned // 2
        angles = torch.rand(table_rows, tokens, width, generator=generator, device=device) * 6
        if not per_pair and not unlike:
            angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
        cos, sin = (table.mul_(scale).to(tables or dtype) for table in (angles.cos(), angles.sin()))
        q, k = projected(heads[0]), projected(heads[1])
        if together:
            q, k = together(torch.cat((q, k), 2)).split(heads, 2)
        if heads_dim == 1:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        kind = {"rotary_dim": rotary, "interleaved": interleaved, "heads_dim": heads_dim}
        return {"q": q, "k": k, "cos": cos, "sin": sin, **kind}

    return make


FAR = 2**30 + 64
"""Elements from one row to the next; to the third one they do not fit 32 bits."""


def _far_apart(x: Tensor) -> Tensor:
    """The same rows `FAR` elements apart. Nothing between is ever touched."""
    room = torch.empty(FAR * (len(x) - 1) + x[0].numel(), dtype=x.dtype, device=x.device)
    return room.as_strided(x.shape, (FAR, *x.stride()[1:])).copy_(x)


def _short_of_far(dtype: torch.dtype, device: torch.device) -> str | None:
    return short_of_memory(2 * FAR * dtype.itemsize, device)


def _packed(x: Tensor) -> Tensor:
    """The heads as a part of wider rows, as in a projection of queries, keys and values together."""
    return torch.cat((x, x, x), 2)[:, :, x.shape[2] : 2 * x.shape[2]]


_MAKES = {
    "one pair": _make(1, 3, (1, 1), 2),
    "Llama": _make(2, 5, (4, 2), 16),
    "gpt-oss, scaled": _make(1, 4, (8, 1), 64, per_pair=True, scale=1.3466),
    "odd number of pairs and heads": _make(2, 3, (7, 3), 22),
    "heads of 128, more than a tile": _make(1, 2, (40, 8), 128),
    "a row of tables for each row": _make(3, 4, (2, 2), 8, table_rows=3),
    "fp32 tables": _make(1, 5, (2, 1), 32, tables=torch.float32),
    "other angles for both of a pair": _make(1, 5, (2, 2), 16, unlike=True),
    "other angles, interleaved": _make(1, 5, (2, 2), 16, unlike=True, interleaved=True),
    "part of a head": _make(2, 4, (3, 1), 32, rotary=8),
    "part of a head, pairs": _make(2, 4, (3, 1), 24, rotary=10, per_pair=True),
    "interleaved": _make(2, 5, (4, 2), 16, interleaved=True),
    "interleaved part, pairs": _make(2, 3, (3, 1), 24, rotary=12, interleaved=True, per_pair=True),
    "heads third": _make(2, 5, (4, 2), 16, heads_dim=2),
    "one token": _make(1, 1, (4, 2), 16),
    "no tokens": _make(2, 0, (4, 2), 16),
    "part of a packed projection": _make(2, 4, (3, 2), 16, layout=_packed),
    "heads before tokens": _make(2, 4, (3, 2), 16, layout=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    "numbers of a head apart": _make(2, 3, (3, 2), 8, layout=lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)),
}
SAMPLES = (
    *(Sample(name=name, make=make) for name, make in _MAKES.items()),
    Sample(name="rows 1.1e9 elements apart", make=_make(3, 2, (2, 1), 8, together=_far_apart), unfit=_short_of_far),
)


def _workload(name: str, tokens: int, heads: tuple[int, int], dim: int, **kind: Any) -> Workload:
    """Each pass reads and writes queries and keys once; tables are read once for a token."""
    dtype = torch.bfloat16
    numbers, table = tokens * sum(heads) * dim, tokens * dim * (1 if kind.get("per_pair") else 2)
    cost = Cost(bytes_moved=(2 * numbers + table) * dtype.itemsize, flops=3 * numbers)
    make = _make(1, tokens, heads, dim, **kind)
    return Workload(name=f"{name} {tokens}x{heads}x{dim}", dtype=dtype, make=make, forward=cost, backward=cost)


WORKLOADS = (
    _workload("Llama-8B", 8192, (32, 8), 128),
    _workload("gpt-oss", 8192, (64, 8), 64, per_pair=True),
    _workload("interleaved", 8192, (32, 8), 128, interleaved=True),
    _workload("a quarter of each head", 8192, (16, 2), 256, rotary=64),
)


def _eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> Outputs:
    """transformers' Llama, or gpt-oss where tables hold one number for each pair."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    half = q.shape[-1] // 2

    def turned(x: Tensor) -> Tensor:
        a, b = x[..., :half], x[..., half:]
        if cos.shape[-1] == half:
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    return turned(q), turned(k)


def _contenders(inputs: Inputs) -> Mapping[str, Callable[[], Outputs]]:
    plain = not inputs["interleaved"] and inputs["rotary_dim"] is None
    eager = _eager if plain else reference.rope
    found: dict[str, Callable[..., Outputs]] = {
        "pegbox": rope,
        "torch": eager,
        "torch.compile": torch.compile(eager, dynamic=False),
    }
    if plain:
        found |= _liger()
    return {name: partial(contender, **inputs) for name, contender in found.items()}


def _liger() -> dict[str, Callable[..., Outputs]]:
    try:
        from liger_kernel.ops.rope import LigerRopeFunction
    except ImportError:
        return {}

    def liger(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> Outputs:
        # It turns q and k in place; a copy keeps the inputs, as every other contender does.
        return tuple(LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin, None, 1, q.shape[-1]))

    def liger_in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> Outputs:
        # The inputs are overwritten each time: the same work on other numbers.
        return tuple(LigerRopeFunction.apply(q.view_as(q), k.view_as(k), cos, sin, None, 1, q.shape[-1]))

    return {"liger, on a copy": liger, "liger": liger_in_place}


def _variants(inputs: Inputs) -> Mapping[str, Callable[[], object]]:
    """The kernel under launch settings around the default."""
    from pegbox_kernels.rope import triton as kernels

    q, k, cos, sin = (inputs[name] for name in ("q", "k", "cos", "sin"))
    rotary = inputs["rotary_dim"] or q.shape[-1]
    parts = (q, k, torch.empty_like(q), torch.empty_like(k), cos, sin)
    kind = (rotary, inputs["interleaved"], inputs["heads_dim"], False)
    return {
        f"turn {pairs} pairs, {warps} warps": partial(kernels.turn, *parts, *kind, launch=kernels.Launch(pairs, warps))
        for pairs, warps in product((512, 1024, 2048, 4096), (1, 2, 4, 8))
    }


SPEC = OpSpec(
    name="rope",
    source="arXiv:2104.09864, eq. 34; scaled tables: arXiv:2309.00071",
    op=rope,
    reference=reference.rope,
    differentiable=("q", "k"),
    outputs=("q", "k"),
    samples=SAMPLES,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    workloads=WORKLOADS,
    contenders=_contenders,
    variants=_variants,
)
