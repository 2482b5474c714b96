"""A backend against plain attention, once at the start of a run, on the shape that the model has.

Random queries, keys and values of two documents, and random sinks where a model has them, go through the backend and
through attention as it is written down: in the run's arithmetic, and in float64 from the same numbers. On Hopper one
long document takes other kernels: one goes through ours as well, on one head of keys, against float32. The rule is
flash attention's: the backend's error against float64 is at most twice that of plain PyTorch in the same arithmetic,
plus a floor. A window that is one token off, a sink without a gradient or documents that see each other are far beyond.

The plugins `attention` and `gpt-oss-attention` hold this file in the same words, see `backends`.

    T  tokens    H  heads    K  heads of keys and values    D  size of a head
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from pegbox_attention.backends import Backend, Borders, Masks, Rule, backend

if TYPE_CHECKING:
    from torch import Tensor

    from pegbox_attention.backends import Attend

DOCUMENTS = (211, 109)
"""Tokens of each document: more than the window of gpt-oss, and no multiple of a tile."""
LONG = 4163
"""Tokens of the document that is long enough for kernels of their own; one head of keys keeps plain attention small."""
FLOOR = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FLOOR_TENSOR_CORES = 2e-3
"""Of float32 on a GPU, where matrix products may be taken in TF32."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
NAMES = ("output", "gradient of queries", "gradient of keys", "gradient of values", "gradient of sinks")


@dataclass(frozen=True)
class Heads:
    """The shape of a layer's attention: query heads, heads of keys, numbers of a head, and a window in tokens."""

    heads: int
    key_heads: int
    size: int
    window: int | None
    sinks: bool = True
    softcap: float | None = None

    def __str__(self) -> str:
        seen = "the whole row" if self.window is None else f"a window of {self.window}"
        return f"{self.heads} heads of {self.size} on {self.key_heads}, {seen}"


@dataclass(frozen=True)
class Checked:
    """The largest error of a backend, relative to the largest value of the tensor it is in, and what was allowed."""

    error: float
    allowed: float
    where: str

    @property
    def right(self) -> bool:
        """Whether the error is allowed; one that is no number is not."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"largest error {self.error:.1e} ({self.where}), {self.allowed:.1e} allowed"


def check(name: Backend, heads: Heads, device: torch.device, dtype: str, *, deterministic: bool) -> Checked:
    """The worst of what a backend computes on this shape, forward and backward; what it raises is raised."""
    arithmetic = DTYPES[dtype]
    rule = Rule(heads.size**-0.5, heads.window, heads.softcap, deterministic)
    found = _compared(name, heads, DOCUMENTS, device, arithmetic, rule, torch.float64)
    if name == "pegbox" and _has_own_kernels(heads, device, arithmetic):
        group = replace(heads, heads=heads.heads // heads.key_heads, key_heads=1)
        found += _compared(name, group, (LONG,), device, arithmetic, rule, torch.float32)
    return next((one for one in found if one.error != one.error), max(found, key=lambda one: one.error / one.allowed))


def _has_own_kernels(heads: Heads, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a long document alone is computed by other kernels than documents that share a row."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return hopper and heads.window is None and dtype.itemsize == 2


def _compared(
    name: Backend,
    heads: Heads,
    documents: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    rule: Rule,
    exactly: torch.dtype,
) -> list[Checked]:
    masks, plain = Masks(), backend("eager", Masks())
    inputs = _inputs(heads, sum(documents), device, dtype)
    borders = Borders(torch.tensor([0, *documents], device=device).cumsum(0).to(torch.int32), max(documents))
    exact = _results(plain, [part.to(exactly) for part in inputs], borders, rule, heads.sinks)
    rounded = _results(plain, inputs, borders, rule, heads.sinks)
    got = _results(backend(name, masks), inputs, borders, rule, heads.sinks)
    on_tensor_cores = dtype == torch.float32 and device.type == "cuda"
    floor = FLOOR_TENSOR_CORES if on_tensor_cores else FLOOR[dtype]
    return [
        Checked(_distance(mine, true), 2 * _distance(plainly, true) + floor, where)
        for mine, plainly, true, where in zip(got, rounded, exact, NAMES, strict=False)
    ]


def _inputs(heads: Heads, tokens: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values, sinks, and a gradient of the output; nobody's randomness moves."""
    random = torch.Generator(device).manual_seed(0)
    shapes: list[tuple[int, ...]] = [
        (tokens, count, heads.size) for count in (heads.heads, heads.key_heads, heads.key_heads)
    ]
    shapes += [(heads.heads,), (tokens, heads.heads, heads.size)]
    return [torch.randn(shape, generator=random, device=device).to(dtype) for shape in shapes]


def _results(attend: Attend, inputs: list[Tensor], borders: Borders, rule: Rule, sinks: bool) -> list[Tensor]:
    """Output and gradients of queries, keys, values and, with `sinks`, of those."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [part.detach().clone().requires_grad_() for part in inputs[: 4 if sinks else 3]]
        q_THD, k_TKD, v_TKD = leaves[:3]
        out_THD = attend(q_THD, k_TKD, v_TKD, leaves[3] if sinks else None, borders, rule)
        return [out_THD.detach(), *torch.autograd.grad(out_THD, leaves, inputs[4])]


def _distance(one: Tensor, true: Tensor) -> float:
    return float((one.double() - true).abs().max() / true.abs().max())
