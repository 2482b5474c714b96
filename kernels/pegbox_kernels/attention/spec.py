"""The record of the operation: what its tests compare and its benchmark measures.

T tokens of all documents, H query heads, K key heads, D head_dim. Operations are counted for the pairs of tokens that
see each other: 4 H D per pair forward (two products), 10 H D backward (five).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pegbox_kernels.attention import attention, block_table, reference
from pegbox_kernels.harness.opspec import Cost, Inputs, Make, OpSpec, Outputs, Sample, Workload

Layout = Callable[[Tensor], Tensor]
EAGER_TOKENS = 4096
"""Plain PyTorch forms T x T scores of every head: no more tokens than that."""

ENOUGH_HEADS = 8
"""The gradient of a sink is a sum over all tokens, whose error is that of rounded outputs. The largest error of a few
heads says little about that of another implementation: half precision compares it in samples of more."""


def lengths_to_borders(lengths: tuple[int, ...]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def _make(
    lengths: tuple[int, ...],
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    *,
    window: int | None = None,
    causal: bool = True,
    sinks: float | Tensor | None = 1.0,
    scale: float | None = None,
    deterministic: bool = False,
    spread: float = 1.0,
    layout: Layout | None = None,
    packed: bool = True,
) -> Make:
    """Normal q, k, v and sinks. `sinks`: their spread, or their values, or None; `layout` strides q, k and v."""

    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        tokens, generator = sum(lengths), torch.Generator(device).manual_seed(sum(lengths) + head_dim)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32, device=device)

        shapes = [(tokens, count, head_dim) for count in (heads[0], heads[1], heads[1])]
        tensors = [normal(*shape).mul_(size).to(dtype) for shape, size in zip(shapes, (spread, 1, 1), strict=True)]
        q, k, v = (layout(tensor) if layout else tensor for tensor in tensors)
        sink = normal(heads[0]) * sinks if isinstance(sinks, float) else None if sinks is None else sinks.to(device)
        trained = dtype == torch.float32 or heads[0] >= ENOUGH_HEADS
        borders = torch.tensor(lengths_to_borders(lengths), dtype=torch.int32).to(device) if packed else None
        return {
            "q_THD": q,
            "k_TKD": k,
            "v_TKD": v,
            "sinks_H": sink if trained else None,
            "frozen_sinks_H": None if trained else sink,
            "cu_seqlens_S": borders,
            "scale": scale or head_dim**-0.5,
            "causal": causal,
            "window": window,
            "deterministic": deterministic,
        }

    return make


def of_fused(tensor: Tensor) -> Tensor:
    """The same values as a slice of a fused projection: heads of one token adjacent, tokens further apart."""
    rows, heads, head_dim = tensor.shape
    fused = torch.zeros(rows, heads + 3, head_dim, dtype=tensor.dtype, device=tensor.device)
    return fused[:, 2 : heads + 2].copy_(tensor)


def heads_outer(tensor: Tensor) -> Tensor:
    """The same values as a view of (heads, tokens, head_dim), which is how transformers holds them."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def _one_score(dtype: torch.dtype, device: torch.device) -> str | None:
    """Of one score the gradient is dP - do . out, which only rounding keeps from being proportional to that of P."""
    return None if dtype == torch.float32 else "the gradient of one score is what rounding of the output leaves"


INFINITE = torch.tensor([-math.inf, 80.0, -80.0, 0.0])

SAMPLES = (
    Sample(name="one token", make=_make((1,), packed=False), unfit=_one_score),
    *(
        Sample(name=name, make=make, frozen=frozen)
        for name, (make, frozen) in {
            "63 tokens": (_make((63,), packed=False), ()),
            "65 tokens, window 16": (_make((65,), window=16, packed=False), ()),
            "127 tokens, no sinks": (_make((127,), sinks=None, packed=False), ()),
            "300 tokens": (_make((300,), (2, 1), packed=False), ()),
            "300 tokens, deterministic": (_make((300,), (2, 2), packed=False, deterministic=True), ()),
            "300 tokens, window 1": (_make((300,), (2, 1), window=1, packed=False), ()),
            "300 tokens, window 128": (_make((300,), (2, 1), window=128, packed=False), ()),
            "300 tokens, window 129": (_make((300,), (1, 1), window=129), ()),
            "300 tokens, window 200": (_make((300,), (2, 1), window=200), ()),
            "documents of 1, 63, 65, 2, 130": (_make((1, 63, 65, 2, 130)), ()),
            "documents, deterministic": (_make((1, 63, 0, 65, 2, 130), deterministic=True), ()),
            "documents, window 128": (_make((70, 1, 0, 190, 5), (4, 1), window=128), ()),
            "documents, window 16": (_make((5, 33, 0, 150), window=16), ()),
            "documents, window of another size": (_make((5, 33, 0, 220), window=140), ()),
            "documents, window longer than any": (_make((5, 33, 60), window=1000), ()),
            "documents, not causal": (_make((5, 33, 100), causal=False), ()),
            "group of 8, window 128": (_make((140,), (8, 1), window=128), ()),
            "group of 3": (_make((70,), (3, 1)), ()),
            "group of 3, window 100": (_make((150,), (3, 1), window=100), ()),
            "16 heads": (_make((90,), (16, 2), 32), ()),
            "16 heads, deterministic": (_make((90,), (16, 2), 32, deterministic=True), ()),
            "16 heads, window 60": (_make((90,), (16, 2), 32, window=60), ()),
            "frozen sinks": (_make((70,)), ("sinks_H",)),
            "frozen sinks, window 64": (_make((150,), window=64), ("sinks_H",)),
            "sinks without end, far above and far below": (_make((90,), sinks=INFINITE), ()),
            "sinks far above, window 32": (_make((90,), sinks=INFINITE, window=32), ()),
            "sharp": (_make((130,), spread=8.0, scale=0.3), ()),
            "head_dim 32": (_make((70,), head_dim=32, window=40), ()),
            "head_dim 80": (_make((70,), head_dim=80), ()),
            "head_dim 96, deterministic": (_make((70,), head_dim=96, deterministic=True), ()),
            "head_dim 128": (_make((140,), (2, 1), 128, sinks=None), ()),
            "head_dim 128, window 128": (_make((140,), (2, 1), 128, window=128), ()),
            "head_dim 256": (_make((40,), (2, 1), 256), ()),
            "head_dim 3": (_make((20,), (2, 1), 3), ()),
            "slices of a fused projection": (_make((40, 90), layout=of_fused), ()),
            "slices, window 128": (_make((40, 150), layout=of_fused, window=128), ()),
            "heads outside": (_make((40, 90), layout=heads_outer), ()),
            "head_dim not the fastest": (
                _make((40,), layout=lambda z: z.transpose(1, 2).contiguous().transpose(1, 2)),
                (),
            ),
        }.items()
    ),
)


def pairs(lengths: tuple[int, ...], window: int | None) -> int:
    """How many pairs of tokens see each other, causally."""
    width = window or max(lengths)
    full = [min(length, width) for length in lengths]
    return sum(f * (f + 1) // 2 + (length - f) * f for length, f in zip(lengths, full, strict=True))


def _workload(
    name: str,
    lengths: tuple[int, ...],
    heads: tuple[int, int] = (64, 8),
    head_dim: int = 64,
    window: int | None = None,
    sinks: float | None = 1.0,
) -> Workload:
    """q, k, v are read and out written forward; backward reads those and dout, and writes dq, dk, dv."""
    tokens, dtype = sum(lengths), torch.bfloat16
    of_queries, of_keys = (tokens * count * head_dim * dtype.itemsize for count in heads)
    work = heads[0] * head_dim * pairs(lengths, window)
    make = _make(lengths, heads, head_dim, window=window, sinks=sinks, packed=len(lengths) > 1)
    return Workload(
        name=name,
        dtype=dtype,
        make=make,
        forward=Cost(bytes_moved=2 * of_queries + 2 * of_keys, flops=4 * work),
        backward=Cost(bytes_moved=4 * of_queries + 4 * of_keys, flops=10 * work),
    )


MIXED = (37, 1900, 5, 410, 1024, 77, 2600, 650, 133, 1356)
"""Documents of 8192 tokens, as packing makes them."""

WORKLOADS = (
    _workload("causal 8192", (8192,)),
    _workload("window 128, 8192", (8192,), window=128),
    _workload("causal 16384", (16384,)),
    _workload("causal 4096", (4096,)),
    _workload("window 128, 16384", (16384,), window=128),
    _workload("packed 8192", MIXED),
    _workload("packed 8192, window 128", MIXED, window=128),
    _workload("causal 8192, 32/8 heads of 128, no sinks", (8192,), (32, 8), 128, sinks=None),
)


def _op(**inputs: object) -> Outputs:
    return tuple(attention(**_given(inputs)))  # type: ignore[arg-type]


def _reference(**inputs: object) -> Outputs:
    inputs.pop("deterministic")
    return reference.attention(**_given(inputs))  # type: ignore[arg-type]


def _given(inputs: dict[str, object]) -> dict[str, object]:
    """The arguments of the operation."""
    frozen = inputs.pop("frozen_sinks_H")
    return inputs if frozen is None else {**inputs, "sinks_H": frozen}


def _ours(inputs: Inputs, deterministic: bool) -> Callable[[], Outputs]:
    tokens = inputs["q_THD"].shape[0]
    borders = inputs["cu_seqlens_S"]
    plan = None if borders is None else block_table(borders, tokens)
    given = _given({**inputs, "cu_seqlens_S": plan, "deterministic": deterministic})
    return lambda: (attention(**given).out_THD,)


def _contenders(inputs: Inputs) -> Mapping[str, Callable[[], Outputs]]:
    found = {"pegbox": _ours(inputs, False), "pegbox deterministic": _ours(inputs, True)}
    found |= {name: contender for name, make in PEERS.items() if (contender := make(inputs)) is not None}
    return found


def _flash_attention_4(inputs: Inputs) -> Callable[[], Outputs] | None:
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        return None
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    q, k, v, borders = (inputs[name] for name in ("q_THD", "k_TKD", "v_TKD", "cu_seqlens_S"))
    window = inputs["window"]
    options = {
        "softmax_scale": inputs["scale"],
        "causal": True,
        "window_size": (None, None) if window is None else (window - 1, 0),
        "learnable_sink": inputs["sinks_H"],
    }

    def run() -> Outputs:
        if borders is None:
            out = flash_attn_func(q[None], k[None], v[None], **options)
            # Not [0], whose gradient is zeros and a copy.
            return ((out[0] if isinstance(out, tuple) else out).squeeze(0),)
        out = flash_attn_varlen_func(q, k, v, cu_seqlens_q=borders, cu_seqlens_k=borders, **options)
        return (out[0] if isinstance(out, tuple) else out,)

    return run


def _flex(inputs: Inputs) -> Callable[[], Outputs] | None:
    """Its outputs scaled by what a sink leaves, 1 / (1 + exp(sink - lse)): exact, through the gradient of lse."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v, sinks = (inputs[name] for name in ("q_THD", "k_TKD", "v_TKD", "sinks_H"))
    window, borders, tokens = inputs["window"], inputs["cu_seqlens_S"], q.shape[0]
    if q.device.type != "cuda":
        return None
    document = torch.zeros(tokens, dtype=torch.int32, device=q.device)
    if borders is not None:
        document = torch.bucketize(torch.arange(tokens, device=q.device), borders[1:].long(), right=True)

    def seen(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        causal = (i >= j) if window is None else (i >= j) & (i - j < window)
        return causal if borders is None else causal & (document[i] == document[j])

    mask = create_block_mask(seen, None, None, tokens, tokens, device=q.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run() -> Outputs:
        heads_first = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        out, lse = compiled(*heads_first, block_mask=mask, scale=inputs["scale"], enable_gqa=True, return_lse=True)
        if sinks is not None:
            out = out * torch.sigmoid(lse - sinks.float().view(1, -1, 1)).unsqueeze(-1).to(out.dtype)
        return (out.squeeze(0).transpose(0, 1),)

    return run


def _sdpa(inputs: Inputs) -> Callable[[], Outputs] | None:
    if inputs["window"] is not None or inputs["cu_seqlens_S"] is not None:
        return None

    def run() -> Outputs:
        heads_first = (inputs[name].transpose(0, 1)[None] for name in ("q_THD", "k_TKD", "v_TKD"))
        out = torch.nn.functional.scaled_dot_product_attention(
            *heads_first, is_causal=True, scale=inputs["scale"], enable_gqa=True
        )
        return (_used(out.squeeze(0).transpose(0, 1), inputs["sinks_H"]),)

    return run


def _used(out: Tensor, sinks: Tensor | None) -> Tensor:
    """A peer without sinks still has a gradient for them, zero: the benchmark asks for it. One pass over a head."""
    if sinks is not None:
        out[:1, :, :1] += 0 * sinks.view(1, -1, 1)
    return out


def _eager(inputs: Inputs) -> Callable[[], Outputs] | None:
    """As transformers writes it: T x T scores, the sink as one more column."""
    q, k, v, sinks = (inputs[name] for name in ("q_THD", "k_TKD", "v_TKD", "sinks_H"))
    tokens, borders = q.shape[0], inputs["cu_seqlens_S"]
    if tokens > EAGER_TOKENS or borders is not None:
        return None

    def run() -> Outputs:
        group = q.shape[1] // k.shape[1]
        queries, keys, values = q.transpose(0, 1), *(t.transpose(0, 1).repeat_interleave(group, 0) for t in (k, v))
        scores = queries @ keys.transpose(1, 2) * inputs["scale"]
        hidden = ~reference.visible(tokens, True, inputs["window"], q.device)
        scores = scores.masked_fill(hidden, -math.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(scores.dtype).view(-1, 1, 1).expand(-1, tokens, 1)], -1)
        scores = scores - scores.max(-1, keepdim=True).values
        p = scores.softmax(-1, dtype=scores.dtype)[..., :tokens]
        return ((p @ values).transpose(0, 1),)

    return run


PEERS: dict[str, Callable[[Inputs], Callable[[], Outputs] | None]] = {
    "flash-attn-4": _flash_attention_4,
    "flex_attention, sink by lse": _flex,
    "sdpa, no sink": _sdpa,
    "eager": _eager,
}


def _variants(inputs: Inputs) -> Mapping[str, Callable[[], object]]:
    """Each kernel under launch settings around the default; every way backward."""
    from pegbox_kernels.attention.sweep import variants

    return variants(inputs)


SPEC = OpSpec(
    name="attention",
    source="online softmax: arXiv:1805.02867; FlashAttention-2: arXiv:2307.08691; sinks: gpt-oss (arXiv:2508.10925)",
    op=_op,
    reference=_reference,
    differentiable=("q_THD", "k_TKD", "v_TKD", "sinks_H"),
    outputs=("out_THD", "lse_HT"),
    samples=SAMPLES,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    workloads=WORKLOADS,
    contenders=_contenders,
    variants=_variants,
    spilling=frozenset({"keys_kernel", "hopper_forward_kernel", "hopper_backward_kernel"}),
)
