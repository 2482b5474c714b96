"""The record of the operation: what its tests compare and its benchmark measures.

T tokens, K inputs, N outputs, I width of an MLP, r rank. So that one record serves groups of any size, the factors of
all projections lie one after the other in `a` and in `b`, weights in `w`, biases in `bias`; `Block` says where.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pegbox_kernels.harness.opspec import Cost, Inputs, Make, OpSpec, Outputs, Sample, Workload
from pegbox_kernels.lora_linear import Projection, lora_linears, lora_mlp, reference

Layout = Callable[[Tensor], Tensor]


class Block(NamedTuple):
    """A group of projections that share x, or an MLP of gate, up and down."""

    kind: Literal["linears", "mlp"]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    ranks: tuple[int, ...]
    activation: str = "silu"

    def parts(self, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> list[tuple[Tensor, ...]]:
        """(W, A, B, bias or None) of each projection, as views."""
        shapes = list(zip(self.inputs, self.outputs, self.ranks, strict=True))
        weights = w.split([k * n for k, n, _ in shapes])
        factors_a, factors_b = a.split([r * k for k, _, r in shapes]), b.split([n * r for _, n, r in shapes])
        biases = bias.split(list(self.outputs)) if bias is not None else [None] * len(shapes)
        return [
            (weights[i].view(n, k), factors_a[i].view(r, k), factors_b[i].view(n, r), biases[i])
            for i, (k, n, r) in enumerate(shapes)
        ]


def linears(inputs: int, outputs: tuple[int, ...], ranks: tuple[int, ...]) -> Block:
    """Projections of one x."""
    return Block("linears", (inputs,) * len(outputs), outputs, ranks)


def mlp(inputs: int, width: int, ranks: tuple[int, ...], activation: str = "silu", outputs: int | None = None) -> Block:
    """A gated MLP."""
    return Block("mlp", (inputs, inputs, width), (width, width, outputs or inputs), ranks, activation)


def _make(
    rows: tuple[int, ...], block: Block, *, scale: float = 2.0, bias: bool = False, layout: Layout | None = None
) -> Make:
    """Everything normal and of the size that keeps outputs near 1; factors and biases in fp32, as they are trained."""

    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(sum(block.outputs) + sum(rows))

        def normal(*shape: int, spread: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).mul_(spread)

        def joined(shapes: list[tuple[int, float]]) -> Tensor:
            return torch.cat([normal(size, spread=spread) for size, spread in shapes] or [normal(0)])

        shapes = list(zip(block.inputs, block.outputs, block.ranks, strict=True))
        x = normal(*rows, block.inputs[0]).to(dtype)
        return {
            "x": layout(x) if layout else x,
            "w": joined([(k * n, k**-0.5) for k, n, _ in shapes]).to(dtype),
            "a": joined([(r * k, k**-0.5) for k, _, r in shapes]),
            "b": joined([(n * r, max(r, 1) ** -0.5) for _, n, r in shapes]),
            "bias": normal(sum(block.outputs)) if bias else None,
            "block": block,
            "scale": scale,
        }

    return make


def _projections(w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, block: Block, scale: float) -> list[Projection]:
    return [
        Projection(weight=weight, bias=one, scale=scale, **({"a": down, "b": up} if down.shape[0] else {}))
        for weight, down, up, one in block.parts(w, a, b, bias)
    ]


def _op(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, block: Block, scale: float, **keep: Any
) -> Outputs:
    parts = _projections(w, a, b, bias, block, scale)
    if block.kind == "mlp":
        return (lora_mlp(x, *parts, activation=block.activation, **keep), None, None)
    ys = lora_linears(x, parts)
    return (*ys, *[None] * (3 - len(ys)))


def _reference(x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, block: Block, scale: float) -> Outputs:
    parts = block.parts(w, a, b, bias)
    ys = [
        reference.lora_linear(x, *part[:3], scale, part[3])
        for part in (parts if block.kind == "linears" else parts[:2])
    ]
    if block.kind == "mlp":
        h = reference.activate(ys[0], block.activation) * ys[1]
        ys = [reference.lora_linear(h, *parts[2][:3], scale, parts[2][3])]
    return (*ys, *[None] * (3 - len(ys)))


SAMPLES = tuple(
    Sample(name=name, make=make)
    for name, make in {
        "one projection, rank 1": _make((3,), linears(8, (5,), (1,))),
        "one row": _make((), linears(16, (24,), (4,))),
        "no rows": _make((0, 4), linears(16, (24, 8), (4, 2))),
        "three projections, odd sizes, ranks 5, 3 and 7": _make((2, 33), linears(63, (30, 17, 50), (5, 3, 7))),
        "the middle one without an update": _make((40,), linears(32, (32, 16, 16), (8, 0, 8)), bias=True),
        "rank 256": _make((70,), linears(64, (96,), (256,)), scale=0.25),
        "biases": _make((5, 7), linears(48, (20, 10), (4, 4)), bias=True, scale=-1.5),
        "x not contiguous": _make((9, 6), linears(24, (24, 8, 8), (2, 2, 2)), layout=lambda x: x.transpose(0, 1)),
        "x sliced": _make((9,), linears(32, (40, 8), (3, 2)), layout=lambda x: x[::2]),
        "mlp": _make((2, 40), mlp(32, 160, (16, 16, 16))),
        "mlp, odd sizes and ranks": _make((37,), mlp(23, 131, (5, 1, 7), outputs=19), bias=True),
        "mlp, gelu_tanh": _make((33,), mlp(16, 70, (4, 4, 4), "gelu_tanh")),
        "mlp, gelu, ranks beyond what one dot holds": _make((20,), mlp(16, 140, (70, 3, 40), "gelu")),
        "mlp, only up has an update": _make((20,), mlp(16, 64, (0, 4, 0))),
        "mlp, tokens in several chunks": _make((300,), mlp(8, 64, (2, 2, 2))),
        "mlp, no rows": _make((0,), mlp(16, 64, (4, 4, 4))),
    }.items()
)


def _workload(
    name: str, tokens: int, block: Block, dtype: torch.dtype = torch.bfloat16, *, bias: bool = False
) -> Workload:
    """Each input, weight and output once; the GEMMs of the base and of the factors. No gradient of weight or bias."""
    shapes = list(zip(block.inputs, block.outputs, block.ranks, strict=True))
    size, ends = dtype.itemsize, sum(block.outputs) if block.kind == "linears" else block.outputs[-1]
    weights, activations = sum(k * n for k, n, _ in shapes), tokens * (block.inputs[0] + ends)
    base, low = sum(2 * tokens * k * n for k, n, _ in shapes), sum(2 * tokens * r * (k + n) for k, n, r in shapes)
    return Workload(
        name=name,
        dtype=dtype,
        make=_make((tokens,), block, bias=bias),
        frozen=("bias",) if bias else (),
        forward=Cost(bytes_moved=size * (weights + activations), flops=base + low),
        backward=Cost(bytes_moved=size * (weights + activations + tokens * block.inputs[0]), flops=base + 2 * low),
    )


WORKLOADS = (
    _workload("Llama-8B q, k, v, 8192 tokens, r=16", 8192, linears(4096, (4096, 1024, 1024), (16, 16, 16))),
    _workload("Llama-8B o, 8192 tokens, r=16", 8192, linears(4096, (4096,), (16,))),
    _workload("Llama-8B mlp, 8192 tokens, r=16", 8192, mlp(4096, 14336, (16, 16, 16))),
    _workload("Llama-8B mlp, 8192 tokens, r=64", 8192, mlp(4096, 14336, (64, 64, 64))),
    _workload("Qwen3-0.6B mlp, 8192 tokens, r=16", 8192, mlp(1024, 3072, (16, 16, 16))),
    _workload("gpt-oss q, k, v, 8192 tokens, r=16", 8192, linears(2880, (4096, 512, 512), (16, 16, 16)), bias=True),
    _workload("gpt-oss o, 8192 tokens, r=16", 8192, linears(4096, (2880,), (16,)), bias=True),
)


def _contenders(inputs: Inputs) -> Mapping[str, Callable[[], Outputs]]:
    given = {name: value for name, value in inputs.items() if value is not None or name == "bias"}
    found: dict[str, Callable[[], Outputs]] = {"pegbox": partial(_op, **given)}
    if inputs["block"].kind == "mlp":
        found["pegbox, keep input"] = partial(_op, **given, keep="input")
    found["torch"] = partial(_reference, **given)
    if importlib.util.find_spec("peft") is not None:
        found["peft"] = _peft(inputs, compiled=False)
        found["peft, torch.compile"] = _peft(inputs, compiled=True)
    if importlib.util.find_spec("unsloth") is not None and inputs["bias"] is None:
        found["unsloth"] = partial(_unsloth, **given)
    return found


class _Layers(torch.nn.Module):
    """Plain linear layers on the frozen weights and biases of a block, for PEFT to adapt."""

    def __init__(self, parts: list[tuple[Tensor, ...]], block: Block) -> None:
        super().__init__()
        self.block = block
        self.linear = torch.nn.ModuleList(torch.nn.Linear(1, 1, bias=False, device="meta") for _ in parts)
        for layer, (weight, _, _, bias) in zip(self.linear, parts, strict=True):
            layer.out_features, layer.in_features = weight.shape
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            layer.bias = None if bias is None else torch.nn.Parameter(bias.to(weight.dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Outputs:
        if self.block.kind == "linears":
            return tuple(layer(x) for layer in self.linear)
        gate, up, down = self.linear
        return (down(reference.activate(gate(x), self.block.activation) * up(x)),)


def _peft(inputs: Inputs, *, compiled: bool) -> Callable[[], Outputs]:
    """PEFT's layers under autocast, their factors taken from the inputs."""
    from peft import LoraConfig, inject_adapter_in_model

    block, x = inputs["block"], inputs["x"]
    layers = _Layers(block.parts(inputs["w"], inputs["a"], inputs["b"], inputs["bias"]), block)
    ranks = {f"linear.{i}": rank for i, rank in enumerate(block.ranks)}
    alphas = {name: rank * inputs["scale"] for name, rank in ranks.items()}
    inject_adapter_in_model(LoraConfig(target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=alphas), layers)
    call = torch.compile(layers, dynamic=False) if compiled else layers

    def run() -> Outputs:
        factors = {}
        for i, part in enumerate(block.parts(inputs["w"], inputs["a"], inputs["b"], None)):
            factors[f"linear.{i}.lora_A.default.weight"], factors[f"linear.{i}.lora_B.default.weight"] = part[1:3]
        with torch.autocast(x.device.type, dtype=x.dtype, enabled=x.dtype != torch.float32):
            return torch.func.functional_call(call, _renamed(factors, compiled), (x,))

    return run


def _renamed(factors: dict[str, Tensor], compiled: bool) -> dict[str, Tensor]:
    return {f"_orig_mod.{name}": value for name, value in factors.items()} if compiled else factors


def _unsloth(x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: None, block: Block, scale: float) -> Outputs:
    """Its autograd functions, imported when first called: the import changes other libraries."""
    from unsloth.kernels import fast_lora, swiglu

    each = [value for part in block.parts(w, a, b, None) for value in (part[0], None, part[1], part[2], scale)]
    with torch.autocast(x.device.type, dtype=x.dtype, enabled=x.dtype != torch.float32):
        x = x.unsqueeze(0)
        if block.kind == "mlp":
            kernels = (swiglu.swiglu_fg_kernel, swiglu.swiglu_DWf_DW_dfg_kernel)
            return (fast_lora.LoRA_MLP.apply(x, *each, *kernels, False),)
        if len(block.outputs) == 1:
            return (fast_lora.LoRA_W.apply(x, *each),)
        return tuple(fast_lora.LoRA_QKV.apply(x, *each, False))


def _variants(inputs: Inputs) -> Mapping[str, Callable[[], object]]:
    """The kernels of the MLP under launch settings around the default, and sums by GEMMs in place of the kernel's."""
    from pegbox_kernels.lora_linear import triton as kernels

    block: Block = inputs["block"]
    if block.kind != "mlp":
        return {}
    x, width, ranks = inputs["x"], block.outputs[0], block.ranks
    tokens = x.shape[0]
    gate, up, dh = (torch.randn(tokens, width, dtype=x.dtype, device=x.device) for _ in range(3))
    p = torch.randn(tokens, ranks[0] + ranks[1], dtype=x.dtype, device=x.device)
    dp_down = torch.randn(tokens, ranks[2], dtype=x.dtype, device=x.device)
    b_gate, b_up = (torch.randn(width, rank, dtype=x.dtype, device=x.device) for rank in ranks[:2])
    a_down = torch.randn(ranks[2], width, dtype=x.dtype, device=x.device)
    ends = (inputs["scale"], inputs["scale"], block.activation)
    found: dict[str, Callable[[], object]] = {}
    forward = partial(kernels.forward, gate, up, p, b_gate, b_up, a_down, *ends)
    for rows, columns, warps in ((32, 128, 4), (32, 128, 8), (64, 64, 4), (64, 128, 8), (32, 256, 8), (16, 256, 4)):
        launch = kernels.Launch(rows, columns, warps, stages=1)
        found[f"forward  {rows}x{columns} {warps}w"] = partial(forward, launch=launch)
    for rows, columns, warps in ((64, 64, 4), (128, 64, 8), (32, 64, 2), (32, 128, 8)):
        launch = kernels.Launch(rows, columns, warps, stages=1)
        found[f"forward  {rows}x{columns} {warps}w, sums inside"] = partial(forward, launch=launch, reduce=True)
    saved = (dh, gate, up, p, b_gate, b_up, dp_down, a_down, *ends, False)
    for rows, columns, warps in ((32, 128, 8), (32, 64, 4), (16, 128, 4), (32, 256, 8)):
        launch = kernels.Launch(rows, columns, warps, stages=1)
        name = f"backward {rows}x{columns} {warps}w, sums by GEMMs"
        found[name] = partial(kernels.backward, *saved, launch=launch, reduce=False)
        for stages, chunks in ((1, 8), (2, 4), (2, 8), (2, 16), (3, 8)) if max(ranks) <= kernels.REDUCED_RANK else ():
            launch = kernels.Launch(rows, columns, warps, stages, chunks)
            name = f"backward {rows}x{columns} {warps}w {stages}s {chunks} chunks"
            found[name] = partial(kernels.backward, *saved, launch=launch, reduce=True)
    return found


SPEC = OpSpec(
    name="lora_linear",
    source="LoRA: arXiv:2106.09685; gated MLPs: arXiv:2002.05202; fusions: README.md",
    op=_op,
    reference=_reference,
    differentiable=("x", "a", "b", "bias"),
    outputs=("y0", "y1", "y2"),
    samples=SAMPLES,
    dtypes=(torch.float32, torch.bfloat16),
    workloads=WORKLOADS,
    contenders=_contenders,
    variants=_variants,
)
