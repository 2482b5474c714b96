"""The record of the operation: what its tests compare and its benchmark measures.

T tokens, K choices of each, E experts, H hidden, I intermediate, R rank; N = T K rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pegbox_kernels.experts import ExpertLora, moe_experts, reference
from pegbox_kernels.harness.opspec import Cost, Inputs, Make, OpSpec, Outputs, Sample, Workload
from pegbox_kernels.mxfp4 import PackedMxfp4
from pegbox_kernels.mxfp4 import reference as mxfp4

SCALE = 2.0
BASE = ("gate_up", "down", "gate_up_bias", "down_bias")
FACTORS = ("gate_up_a", "gate_up_b", "down_a", "down_b")


class Shape(NamedTuple):
    """Sizes of one case; `family` says how its weights lie and which activation it has."""

    tokens: int
    top_k: int
    experts: int
    hidden: int
    intermediate: int
    rank: int = 0
    family: str = "gpt_oss"
    chosen: str = "spread"
    base: str = "auto"
    strided: bool = False
    packed: bool = False


def _make(shape: Shape) -> Make:
    """Weights like a model's; experts at random, `one` for all, or `some`: those of the last two are none."""

    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(shape.tokens + shape.hidden)

        def normal(*size: int, spread: float = 1.0) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float32, device=device).mul_(spread).to(dtype)

        tokens, top_k, experts, hidden, inner, rank = shape[:6]
        gpt_oss = shape.family == "gpt_oss"
        wide, narrow = hidden**-0.5, inner**-0.5
        gate_up = (experts, hidden, 2 * inner) if gpt_oss else (experts, 2 * inner, hidden)
        down = (experts, inner, hidden) if gpt_oss else (experts, hidden, inner)
        scores = torch.rand((tokens, experts), generator=generator, dtype=torch.float32, device=device)
        chosen = scores.topk(top_k, dim=-1).indices
        if shape.chosen == "one":
            chosen = torch.full_like(chosen, experts // 2)
        if shape.chosen == "some":
            chosen = torch.where(chosen >= experts - 2, experts, chosen)

        def packed(size: int, width: int) -> PackedMxfp4:
            """Random bytes: E2M1 has a spread of about 3, so that the scale gives width^-0.5."""
            blocks = (experts, size, width // 32, 16)
            drawn = torch.randint(0, 256, blocks, generator=generator, dtype=torch.uint8, device=device)
            scale = 127 + round(math.log2(width**-0.5 / 3))
            return PackedMxfp4(drawn, torch.full(blocks[:-1], scale, dtype=torch.uint8, device=device))

        x = normal(tokens, hidden * 2 if shape.strided else hidden)
        return {
            "hidden": x[:, :hidden],
            "chosen": chosen,
            "weights": normal(tokens, top_k).float().softmax(-1).to(dtype),
            "gate_up": packed(2 * inner, hidden) if shape.packed else normal(*gate_up, spread=wide),
            "down": packed(hidden, inner) if shape.packed else normal(*down, spread=narrow),
            "gate_up_bias": normal(experts, 2 * inner) if gpt_oss else None,
            "down_bias": normal(experts, hidden) if gpt_oss else None,
            "gate_up_a": normal(experts, rank, hidden, spread=wide) if rank else None,
            "gate_up_b": normal(experts, 2 * inner, rank, spread=0.1) if rank else None,
            "down_a": normal(experts, rank, inner, spread=narrow) if rank else None,
            "down_b": normal(experts, hidden, rank, spread=0.1) if rank else None,
            "activation": "gpt_oss" if gpt_oss else "swiglu",
            "interleaved": gpt_oss,
            "transposed": gpt_oss,
            # A bf16 product beside a bound of the clamp falls on either side, its gradient with it: no error is fair.
            "limit": 1.5 if dtype == torch.float32 else 7.0,
            "base": shape.base,
        }

    return make


def _options(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in ("activation", "interleaved", "transposed", "limit")} | {
        "gate_up_bias_EJ": inputs["gate_up_bias"],
        "down_bias_EH": inputs["down_bias"],
    }


def _pair(inputs: Mapping[str, Any], name: str) -> tuple[Tensor, Tensor, float] | None:
    return None if inputs[f"{name}_a"] is None else (inputs[f"{name}_a"], inputs[f"{name}_b"], SCALE)


def _op(save: str = "preactivation", base: str | None = None, **inputs: Any) -> Outputs:
    factors = {f"lora_{name}": _pair(inputs, name) for name in ("gate_up", "down")}
    loras = {name: ExpertLora(*pair) if pair else None for name, pair in factors.items()}
    given = (inputs[name] for name in ("hidden", "chosen", "weights", "gate_up", "down"))
    return (moe_experts(*given, **_options(inputs), **loras, base=base or "auto", save=save),)  # type: ignore[arg-type]


def _reference(base: str = "auto", **inputs: Any) -> Outputs:
    for name in ("gate_up", "down"):
        if isinstance(inputs[name], PackedMxfp4):
            blocks, scales = inputs[name].blocks, inputs[name].scales
            inputs[name] = mxfp4.dequantize(blocks, scales, inputs["hidden"].dtype).transpose(1, 2)
    loras = {f"lora_{name}": _pair(inputs, name) for name in ("gate_up", "down")}
    given = (inputs[name] for name in ("hidden", "chosen", "weights", "gate_up", "down"))
    return (reference.moe_experts(*given, **_options(inputs), **loras),)


def _without_grouped_mm(dtype: torch.dtype, device: torch.device) -> str | None:
    from pegbox_kernels.experts.grouped import why_not_grouped_mm

    return why_not_grouped_mm(torch.empty(0, dtype=dtype, device=device), ())


def _sample(name: str, shape: Shape, frozen: tuple[str, ...] = ()) -> Sample:
    asked = {"unfit": _without_grouped_mm} if shape.base == "grouped_mm" else {}
    return Sample(name=name, make=_make(shape), frozen=frozen, **asked)


SAMPLES = (
    _sample("gpt-oss, everything trained", Shape(19, 2, 3, 72, 40, rank=5)),
    _sample("gpt-oss, grouped_mm, everything trained", Shape(19, 2, 3, 72, 40, rank=5, base="grouped_mm")),
    _sample("qwen, everything trained, a large rank", Shape(21, 3, 5, 56, 24, rank=40, family="qwen")),
    _sample("qwen, grouped_mm, experts frozen", Shape(21, 3, 5, 56, 24, 3, "qwen", base="grouped_mm"), BASE[:2]),
    _sample("odd sizes, some rows without an expert", Shape(13, 2, 6, 33, 17, rank=1, chosen="some")),
    _sample("every token to one expert, strided rows", Shape(70, 1, 3, 40, 16, 20, chosen="one", strided=True), BASE),
    _sample("experts in MXFP4", Shape(12, 2, 3, 64, 32, rank=4, packed=True), BASE),
    _sample("a token, an expert", Shape(1, 1, 1, 16, 8)),
)


def _workload(
    tokens: int, experts: int, rank: int, full: bool = False, packed: bool = False, base: str = "auto"
) -> Workload:
    """gpt-oss's shape. Least bytes: weights once a pass (and unpacked), states in and out, z both ways."""
    hidden = inner = 2880
    rows, size = tokens * 4, torch.bfloat16.itemsize
    weights = int(experts * 3 * hidden * inner * (17 / 32 + 2 * size if packed else size))
    states, z = tokens * hidden * size, rows * 2 * inner * size
    product = 2 * rows * 3 * hidden * inner
    # Of each factor pair: its two products, again for the gradient of the rows, and for its own.
    lora = 2 * rows * rank * (hidden + 2 * inner + inner + hidden)
    kind = "full" if full else f"LoRA {rank}" if rank else "frozen"
    return Workload(
        name=f"T={tokens} E={experts} {kind}{' MXFP4' if packed else ''}",
        dtype=torch.bfloat16,
        make=_make(Shape(tokens, 4, experts, hidden, inner, rank, base=base, packed=packed)),
        frozen=() if full else BASE,
        forward=Cost(bytes_moved=weights + 2 * states + z, flops=product + lora),
        backward=Cost(
            bytes_moved=(2 if full else 1) * weights + 3 * states + z,
            flops=(2 if full else 1) * product + 2 * lora,
        ),
    )


WORKLOADS = tuple(
    _workload(*case)
    for case in (
        # The provider matters to what compiles where no GPU is; the benchmark measures both.
        (8192, 32, 16, False, False, "grouped_mm"),
        (8192, 32, 0),
        (4096, 32, 16),
        (4096, 32, 0),
        (8192, 128, 16),
        (8192, 128, 0),
        (8192, 32, 0, True, False, "grouped_mm"),
        (8192, 32, 16, False, True),
    )
)


def _contenders(inputs: Inputs) -> Mapping[str, Callable[[], Outputs]]:
    """Ours with each provider, and transformers' experts, with PEFT's LoRA where there is one."""
    tensors = {name: value for name, value in inputs.items() if name != "base"}
    found: dict[str, Callable[[], Outputs]] = {
        "pegbox": partial(_op, **tensors),
        "pegbox, triton": partial(_op, **tensors, base="triton"),
        "pegbox, z recomputed": partial(_op, **tensors, save="none"),
    }
    if isinstance(inputs["gate_up"], PackedMxfp4):
        return found
    try:
        from transformers import GptOssConfig
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    except ImportError:
        return found
    experts, hidden, columns = inputs["gate_up"].shape

    def layer(implementation: str) -> torch.nn.Module:
        config = GptOssConfig(
            num_local_experts=experts, hidden_size=hidden, intermediate_size=columns // 2, num_experts_per_tok=4
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = GptOssExperts(config)
        for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"):
            # Plain tensors, so that gradients reach the leaves of the benchmark.
            delattr(module, name)
            setattr(module, name, inputs[name.replace("_proj", "")])
        return module

    def run(module: torch.nn.Module) -> Outputs:
        return (module(inputs["hidden"], inputs["chosen"], inputs["weights"]),)

    if inputs["gate_up_a"] is None:
        return found | {
            "transformers, eager": partial(run, layer("eager")),
            "transformers, grouped_mm": partial(run, layer("grouped_mm")),
        }
    return found | {"peft on grouped_mm": partial(_peft, layer("grouped_mm"), inputs)}


def _peft(module: Any, inputs: Inputs) -> Outputs:
    """What PEFT's `target_parameters` computes: W + s B A of every expert (its 0.21: one baddbmm), then the layer."""
    given = {name: getattr(module, name) for name in ("gate_up_proj", "down_proj")}
    try:
        for name, weight in given.items():
            a, b = inputs[f"{name.removesuffix('_proj')}_a"], inputs[f"{name.removesuffix('_proj')}_b"]
            setattr(module, name, torch.baddbmm(weight, a.transpose(1, 2), b.transpose(1, 2), alpha=SCALE))
        return (module(inputs["hidden"], inputs["chosen"], inputs["weights"]),)
    finally:
        for name, weight in given.items():
            setattr(module, name, weight)


TILES: dict[str, tuple[tuple[int, ...], ...]] = {
    "project": ((32, 128), (32, 256), (16, 256), (64, 64, 4, 4), (64, 128), (32, 128, 4, 4)),
    "project_grad": ((32, 128), (32, 128, 4, 3, 64), (16, 256), (64, 64, 4, 4), (64, 128), (16, 128)),
    "project_z": ((32, 128), (32, 256), (16, 256), (64, 64, 4, 4), (64, 128), (32, 128, 4, 4)),
    "activate": ((64, 32), (64, 32, 4, 2), (64, 32, 4, 4), (64, 64), (64, 64, 4, 2), (32, 64)),
    "activate_backward": ((32, 64), (32, 64, 4, 2, 168), (64, 32), (64, 32, 4, 2, 168), (16, 64), (32, 32)),
    "add": ((64, 128, 4, 1), (64, 256, 8, 1), (32, 128, 4, 1), (64, 64, 4, 1), (32, 256, 4, 1), (128, 128, 8, 1)),
    "gram": ((64, 128), (64, 64), (32, 128), (64, 128, 8), (64, 128, 4, 4), (128, 64)),
    "combine": ((1, 1024), (1, 1024, 2), (1, 512, 2), (1, 2048), (1, 2048, 8), (1, 4096, 8)),
}
"""What a sweep tries of each kernel: rows, columns, warps, stages, registers; few, for each is compiled."""
PRODUCTS = (
    *((128, 256, 64, 8, 8, 3, 0), (128, 256, 64, 8, 8, 4, 0), (128, 256, 64, 8, 8, 4, 1)),
    *((128, 128, 64, 8, 8, 4, 0), (128, 128, 64, 8, 4, 3, 0), (128, 256, 64, 16, 8, 4, 0)),
)


def _variants(inputs: Inputs) -> Mapping[str, Callable[[], object]]:
    """Kernels under launch settings around the default, each by itself on rows of the workload's routing."""
    from pegbox_kernels.experts import glue, grouped
    from pegbox_kernels.experts.routing import Routing
    from pegbox_kernels.mxfp4 import triton as unpack

    hidden, chosen = inputs["hidden"], inputs["chosen"]
    experts, width, inner = inputs["gate_up"].shape[0], hidden.shape[1], inputs["down"].shape[1]
    routing, found = Routing.of(chosen, experts), {}
    for name, case in _kernels(inputs, routing).items():
        for tile in TILES[name]:
            launch = glue.Launch(*tile)
            bound = f", {launch.registers} registers" if launch.registers else ""
            key = f"{name} {launch.rows}x{launch.columns}, {launch.warps} warps, {launch.stages} stages{bound}"
            found[key] = partial(case, launch=launch)
    if isinstance(inputs["gate_up"], PackedMxfp4):
        blocks = torch.zeros((experts, 2 * inner, width // 32, 16), dtype=torch.uint8, device=hidden.device)
        scales = torch.full(blocks.shape[:-1], 120, dtype=torch.uint8, device=hidden.device)
        for count, warps in ((64, 4), (128, 4), (256, 4), (128, 8), (256, 8)):
            case = partial(unpack.dequantize, blocks, scales, hidden.dtype, launch=unpack.Launch(count, warps))
            found[f"unpack {count} blocks, {warps} warps"] = case
        return found
    pair = _ranks(inputs, chosen.numel())
    product = partial(grouped.multiply, hidden, inputs["gate_up"], routing, top_k=chosen.shape[1])
    for rows, columns, depth, group, warps, stages, resident in PRODUCTS:
        tiles = grouped.Launch(rows, columns, depth, group, warps, stages, resident)
        name = f"product {rows}x{columns}x{depth}, group {group}, {warps} warps, {stages} stages, resident {resident}"
        found[name] = partial(product, lora=(pair, inputs["gate_up_b"]) if pair is not None else None, launch=tiles)
    return found


def _ranks(inputs: Inputs, rows: int) -> Tensor | None:
    """Projections (N, R), if the workload has LoRA."""
    a = inputs["gate_up_a"]
    return None if a is None else inputs["hidden"].new_empty((rows, a.shape[1])).normal_()


def _kernels(inputs: Inputs, routing: Any) -> dict[str, Callable[..., object]]:
    """Each kernel between the products, as the workload calls it with torch's grouped_mm; `launch` is left out."""
    from pegbox_kernels.experts import activation, activation_backward, glue, grouped, sums

    hidden, chosen, rows = inputs["hidden"], inputs["chosen"], inputs["chosen"].numel()
    top_k, inner = chosen.shape[1], inputs["down"].shape[1]
    z, h, y = (hidden.new_empty((rows, n)).normal_() for n in (2 * inner, inner, hidden.shape[1]))
    gate = grouped.Gate(inputs["activation"], inputs["interleaved"], 1.702, 7.0)
    weights = sums.sorted_weights(inputs["weights"], routing)
    bias, down_bias, low = inputs["gate_up_bias"], inputs["down_bias"], _ranks(inputs, rows)
    a, b, a_down, b_down = (inputs[name] for name in FACTORS)
    lora_in, lora_out = (None, None) if low is None else ((low, b), (low, a_down))
    backward = partial(
        activation_backward.backward, z, h, weights, routing, gate, bias=bias, lora_in=lora_in, lora_out=lora_out
    )
    grad = partial(glue.project, hidden, routing, top_k=top_k, write=True, bias=down_bias)
    found: dict[str, Callable[..., object]] = {
        "project": partial(glue.project, hidden, routing, top_k=top_k, factor=a, write=True),
        "project_grad": partial(grad, factor=None if low is None else b_down.transpose(1, 2)),
        "activate": partial(
            activation.forward, z, routing, gate, bias=bias, lora_in=lora_in, a_out=a_down, scale_out=SCALE
        ),
        "activate_backward": partial(backward, added_already=False, write_h=False, summed=False),
        "combine": partial(glue.combine, y, routing, top_k, inputs["weights"], down_bias, chosen),
    }
    if low is not None:
        found |= {
            "project_z": partial(glue.project, z, routing, factor=b.transpose(1, 2)),
            "add": partial(glue.add_rank, y, low, b_down, routing),
            "gram": partial(glue.gram, hidden, routing, top_k=top_k, projected=low, weights=weights, transposed=True),
        }
    return found


SPEC = OpSpec(
    name="experts",
    source="SwiGLU: arXiv:2002.05202; gpt-oss: arXiv:2508.10925; LoRA: arXiv:2106.09685; see reference.py",
    op=_op,
    reference=_reference,
    differentiable=("hidden", "weights", *BASE, *FACTORS),
    outputs=("out",),
    samples=SAMPLES,
    dtypes=(torch.float32, torch.bfloat16),
    workloads=WORKLOADS,
    contenders=_contenders,
    variants=_variants,
)
