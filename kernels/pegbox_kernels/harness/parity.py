"""Compares an operation with its reference, values and gradients, by flash-attention's rule.

    error(ours, truth) <= 2 error(plain, truth) + floor

where truth is the reference on the inputs in fp64 and plain the reference on the inputs as they are: an
operation may not be worse than what it replaces, and no tolerance is chosen by hand. Errors are the largest
absolute difference; where truth is not finite, ours must be the same infinity, or NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pegbox_kernels.harness.opspec import Inputs, OpSpec, Outputs, Sample

SLACK = 2.0


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far one output or gradient is from the truth, and how far it may be."""

    tensor: str
    error: float
    plain_error: float
    floor: float

    @property
    def allowed(self) -> float:
        return SLACK * self.plain_error + self.floor

    @property
    def holds(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        verdict = "ok" if self.holds else "WRONG"
        allowed = f"{self.allowed:.3g} (plain PyTorch: {self.plain_error:.3g})"
        return f"{verdict} {self.tensor}: error {self.error:.3g}, allowed {allowed}"


def compare(spec: OpSpec, sample: Sample, dtype: torch.dtype, device: torch.device) -> list[Agreement]:
    """Agreement of every output, and of the gradient of every differentiable input."""
    inputs = sample.make(dtype, device)
    truth = run(spec, spec.reference, {name: _in_fp64(value) for name, value in inputs.items()}, sample.frozen)
    plain = run(spec, spec.reference, inputs, sample.frozen)
    ours = run(spec, spec.op, inputs, sample.frozen)
    if not ours.keys() == truth.keys() == plain.keys():
        raise AssertionError(f"{spec.name} returns {sorted(ours)}, its reference {sorted(truth)}")
    return [_agreement(name, ours[name], plain[name], truth[name], spec.floor) for name in truth]


def run(spec: OpSpec, op: Callable[..., Outputs], inputs: Inputs, frozen: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Outputs by name and gradients as `d<input>`, for the same random weights of the outputs each time."""
    leaves = spec.leaves(inputs, frozen)
    returned = op(**{**inputs, **leaves})
    outputs = {name: out for name, out in zip(spec.outputs, returned, strict=True) if out is not None}
    differentiable = {name: out for name, out in outputs.items() if out.requires_grad}
    given = (tuple(differentiable.values()), tuple(leaves.values()), cotangents(differentiable))
    gradients = torch.autograd.grad(*given) if leaves else ()
    found = {name: out.detach() for name, out in outputs.items()}
    return found | {f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def cotangents(outputs: dict[str, Tensor]) -> list[Tensor]:
    """Seeded weights of each output, the same for every implementation, dtype and device."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator) for out in outputs.values()]
    return [weight.to(out.device, out.dtype) for weight, out in zip(weights, outputs.values(), strict=True)]


def error(found: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; infinite if shapes differ or other elements than truth's are infinite."""
    if found.shape != truth.shape:
        return math.inf
    found, truth = found.double(), truth.double()
    finite = truth.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return math.inf
    if not torch.equal(found[~finite].nan_to_num(nan=0.5), truth[~finite].nan_to_num(nan=0.5)):
        return math.inf
    difference = (found[finite] - truth[finite]).abs()
    return difference.max().item() if difference.numel() else 0.0


def _agreement(name: str, ours: Tensor, plain: Tensor, truth: Tensor, floor: float) -> Agreement:
    finite = truth[truth.isfinite()].abs()
    largest = max(1.0, finite.max().item()) if finite.numel() else 1.0
    return Agreement(tensor=name, error=error(ours, truth), plain_error=error(plain, truth), floor=floor * largest)


def _in_fp64(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
