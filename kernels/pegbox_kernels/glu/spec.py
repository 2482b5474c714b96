"""The record of the operation: what its tests compare and its benchmark measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from pegbox_kernels.glu import glu, parts, reference
from pegbox_kernels.harness.opspec import Cost, Inputs, Make, OpSpec, Outputs, Sample, Workload

Change = Callable[[Tensor], Tensor]


def _make(
    shape: tuple[int, ...],
    *,
    activation: str = "silu",
    packed: str = "",
    spread: float = 2.0,
    change: Change | None = None,
) -> Make:
    """Normal gate and up, apart or in one tensor (`halves`, `interleaved`)."""

    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(sum(shape))

        def normal(columns: int) -> Tensor:
            size = (*shape[:-1], columns)
            made = torch.randn(size, generator=generator, dtype=torch.float32, device=device).mul_(spread).to(dtype)
            return change(made) if change else made

        kind = {"activation": activation, "layout": packed or "halves"}
        if packed:
            return {"gate": normal(2 * shape[-1]), "up": None, **kind}
        return {"gate": normal(shape[-1]), "up": normal(shape[-1]), **kind}

    return make


def _far_apart(x: Tensor) -> Tensor:
    """The same rows 1.1e9 elements apart: offsets do not fit 32 bits. Nothing between is ever touched."""
    distance = 1_100_000_000
    room = torch.empty(distance * (len(x) - 1) + x[0].numel(), dtype=x.dtype, device=x.device)
    return room.as_strided(x.shape, (distance, 1)).copy_(x)


ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "clamped")
SAMPLES = tuple(
    Sample(name=name, make=make)
    for name, make in {
        **{f"{kind}, 123 columns": _make((5, 123), activation=kind) for kind in ACTIVATIONS},
        **{f"{kind}, halves": _make((3, 100), activation=kind, packed="halves") for kind in ACTIVATIONS},
        **{f"{kind}, interleaved": _make((3, 100), activation=kind, packed="interleaved") for kind in ACTIVATIONS},
        "one number": _make((1,)),
        "three dimensions": _make((2, 3, 63)),
        "more than a block": _make((3, 2880)),
        "halves, more than a block": _make((2, 2880), packed="halves"),
        "interleaved, more than a block": _make((2, 2880), packed="interleaved", activation="clamped"),
        "no rows": _make((0, 64)),
        "no rows, halves": _make((0, 64), packed="halves"),
        "large numbers": _make((3, 64), spread=60.0),
        "large numbers, gelu": _make((3, 64), spread=60.0, activation="gelu"),
        "large numbers, gelu_tanh": _make((3, 64), spread=60.0, activation="gelu_tanh"),
        "all clamped": _make((3, 64), spread=60.0, activation="clamped"),
        "rows with gaps": _make((4, 96), change=lambda x: x[..., :65]),
        "halves with gaps": _make((4, 40), packed="halves", change=lambda x: x[..., :52]),
        "interleaved with gaps": _make((4, 40), packed="interleaved", change=lambda x: x[..., :52]),
        "columns apart": _make((6, 20), change=lambda x: x.t()),
        "three strides": _make((4, 6, 8, 32), change=lambda x: x[:, ::2, ::3]),
        "rows 1.1e9 elements apart": _make((3, 100), change=_far_apart),
        "halves, rows 1.1e9 elements apart": _make((3, 50), packed="halves", change=_far_apart),
        "interleaved, rows 1.1e9 elements apart": _make((3, 50), packed="interleaved", change=_far_apart),
    }.items()
)


def _reference(gate: Tensor, up: Tensor | None, activation: str, layout: str) -> Outputs:
    gate, up = parts(gate, layout) if up is None else (gate, up)
    return (reference.glu(gate, up, activation),)


def _workload(name: str, shape: tuple[int, ...], **kind: Any) -> Workload:
    """Forward reads two and writes one; backward reads three and writes two."""
    dtype = torch.bfloat16
    tensor = prod(shape) * dtype.itemsize
    layout = f", {kind['packed']}" if kind.get("packed") else ""
    return Workload(
        name=f"{name} {'x'.join(map(str, shape))}{layout}",
        dtype=dtype,
        make=_make(shape, spread=1.0, **kind),
        forward=Cost(bytes_moved=3 * tensor, flops=5 * prod(shape)),
        backward=Cost(bytes_moved=5 * tensor, flops=11 * prod(shape)),
    )


WORKLOADS = (
    _workload("Llama-8B", (8192, 14336)),
    _workload("Llama-8B", (8192, 14336), packed="halves"),
    _workload("gpt-oss experts, clamped", (32768, 2880), activation="clamped", packed="interleaved"),
    _workload("Gemma-3-27B, gelu_tanh", (8192, 21504), activation="gelu_tanh"),
)


def _eager(gate: Tensor, up: Tensor | None, activation: str, layout: str) -> Outputs:
    """transformers' own, in the dtype of the inputs."""
    gate, up = parts(gate, layout) if up is None else (gate, up)
    if activation == "clamped":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return ((up + 1) * (gate * torch.sigmoid(gate * 1.702)),)
    if activation == "silu":
        return (nn.functional.silu(gate) * up,)
    return (nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up,)


def _contenders(inputs: Inputs) -> Mapping[str, Callable[[], Outputs]]:
    found: dict[str, Callable[..., Outputs]] = {
        "pegbox": lambda **given: (glu(**given),),
        "torch": _eager,
        "torch.compile": torch.compile(_eager, dynamic=False),
        **(_liger(inputs["activation"]) if inputs["layout"] == "halves" else {}),
    }
    return {name: partial(contender, **inputs) for name, contender in found.items()}


def _liger(activation: str) -> dict[str, Callable[..., Outputs]]:
    try:
        from liger_kernel.ops.geglu import LigerGELUMulFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return {}
    function = {"silu": LigerSiLUMulFunction, "gelu_tanh": LigerGELUMulFunction}.get(activation)
    if function is None:
        return {}

    def liger(gate: Tensor, up: Tensor | None, **_: Any) -> Outputs:
        # Its backward overwrites gate and up with their gradients.
        return (function.apply(*(gate.chunk(2, -1) if up is None else (gate, up))),)

    return {"liger": liger}


def _variants(inputs: Inputs) -> Mapping[str, Callable[[], object]]:
    """Both kernels under launch settings around the default."""
    from pegbox_kernels.glu import triton as kernels

    kind = (inputs["gate"], inputs["up"], inputs["layout"], inputs["activation"], 1.702, 7.0)
    grad = kernels.forward(*kind)
    found: dict[str, Callable[[], object]] = {}
    for block, warps in product((512, 1024, 2048, 4096), (2, 4, 8)):
        launch = kernels.Launch(block, warps)
        found[f"forward  {block} columns, {warps} warps"] = partial(kernels.forward, *kind, launch=launch)
        found[f"backward {block} columns, {warps} warps"] = partial(kernels.backward, grad, *kind, launch=launch)
    return found


SPEC = OpSpec(
    name="glu",
    source="arXiv:2002.05202; clamped: gpt-oss",
    op=lambda **inputs: (glu(**inputs),),
    reference=_reference,
    differentiable=("gate", "up"),
    outputs=("y",),
    samples=SAMPLES,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    workloads=WORKLOADS,
    contenders=_contenders,
    variants=_variants,
)
