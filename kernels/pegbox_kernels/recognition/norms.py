"""RMSNorm, found by what modules compute.

A candidate has no children and no parameter but a weight of one dimension. It is tried on made-up rows, some of them so
small that its epsilon shows, in fp32 and in bfloat16, where the places of rounding show; the first rule that gives the
same numbers in all of them is its rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from pegbox_kernels.recognition.trial import EXACT, MODES, Closeness, equal, inputs_of, numbers, trial
from pegbox_kernels.rms_norm import Cast, rms_norm

ROWS = 8
TINY = 1e-3
"""Spread of the rows that let epsilon show; a usual epsilon is its square."""


@dataclass(frozen=True)
class NormRule:
    """How a norm computes: epsilon, what is added to its weight, where it rounds, and whether it takes a gate."""

    eps: float
    offset: float = 0.0
    cast: Cast = "llama"
    gated: bool = False

    def __str__(self) -> str:
        parts = ["gated"] * self.gated + ["weight + 1"] * (self.offset == 1.0)
        rounding = "rounded before the weight" if self.cast == "llama" else "rounded once"
        return ", ".join((*parts, rounding))

    def __call__(self, x: Tensor, weight: Tensor | None, gate: Tensor | None = None) -> Tensor:
        return rms_norm(x, weight, self.eps, offset=self.offset, cast=self.cast, gate=gate)


def is_candidate(module: nn.Module) -> bool:
    """Whether it could be one: nothing inside but a weight of one dimension, and a small number to be an epsilon.

    Without a weight, torch's own modules are none: a dropout has a small number too.
    """
    own = dict(module.named_parameters(recurse=False))
    fits = own.keys() <= {"weight"} and all(weight.ndim == 1 for weight in own.values())
    fits = fits and (bool(own) or not type(module).__module__.startswith("torch."))
    inside = next(module.children(), None) is not None or next(module.buffers(recurse=False), None) is not None
    return fits and not inside and bool(_epsilons(module))


def rule_of(module: nn.Module) -> NormRule | None:
    """What a candidate computes, or None: something else."""
    takes = inputs_of(module)
    if takes is None or len(takes) not in (1, 2):
        return None
    rules = _rules(_epsilons(module), gated=len(takes) == 2)
    return next((rule for rule in rules if agrees(module, rule, gated=rule.gated)), None)


def _epsilons(module: nn.Module) -> list[float]:
    found = [value for value in vars(module).values() if isinstance(value, float) and 0 < value < 0.1]
    return list(dict.fromkeys(found))


def _rules(epsilons: list[float], *, gated: bool) -> Iterator[NormRule]:
    casts: tuple[Cast, ...] = ("llama", "gemma")
    for eps, offset, cast in product(epsilons, (0.0, 1.0), casts):
        yield NormRule(eps, offset, cast, gated)


@torch.no_grad()
def agrees(
    module: nn.Module,
    compute: Callable[..., Tensor],
    device: torch.device | None = None,
    *,
    gated: bool = False,
    modes: Sequence[tuple[torch.dtype, torch.dtype]] = MODES,
    closeness: Closeness = EXACT,
) -> bool:
    """Whether `compute(x, weight)`, or `compute(x, weight, gate)`, gives what the module does.

    Args:
        device: where both are tried; the CPU if not given.
        modes: data types of rows and weight to try.
        closeness: how near is the same.
    """
    own = module._parameters.get("weight")
    hidden = 64 if own is None else own.shape[0]
    x = numbers(ROWS, hidden) * torch.tensor([1.0, TINY]).repeat(ROWS // 2)[:, None]
    for dtype, weight_dtype in modes:
        made = None if own is None else nn.Parameter(numbers(hidden, seed=1, dtype=weight_dtype).to(device))
        gate = (numbers(ROWS, hidden, seed=2, dtype=dtype).to(device),) if gated else ()
        rows = x.to(device, dtype)
        try:
            expected = trial(module, {"weight": made}, {}).forward(rows, *gate)
        except (RuntimeError, TypeError, AttributeError, ValueError):
            return False
        if not equal(compute(rows, made, *gate), expected, closeness):
            return False
    return True
