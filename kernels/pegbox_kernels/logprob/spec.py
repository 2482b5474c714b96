"""The record of the operation: what its tests compare and its benchmark measures.

N rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from pegbox_kernels.harness.opspec import Cost, Inputs, Make, OpSpec, Outputs, Sample, Workload
from pegbox_kernels.logprob import reference, token_logprobs

Layout = Callable[[Tensor], Tensor]


def _logits(shape: tuple[int, ...], spread: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float32, device=device).mul_(spread).to(dtype)


def _make(
    rows: tuple[int, ...],
    vocab: int,
    *,
    temperature: float = 1.0,
    entropy: bool = True,
    ignored: float = 0.0,
    masked: float = 0.0,
    spread: float = 3.0,
    layout: Layout | None = None,
) -> Make:
    """Normal logits; a share of rows not trained, a share of the vocabulary at -inf (never the target)."""

    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        logits = _logits((*rows, vocab), spread, dtype, device)
        logits = layout(logits) if layout else logits
        generator = torch.Generator(device).manual_seed(vocab)
        targets = torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator, device=device)
        if masked:
            out = torch.rand(logits.shape, generator=generator, device=device) < masked
            logits.masked_fill_(out.scatter(-1, targets.unsqueeze(-1), False), -math.inf)
        if ignored:
            targets[torch.rand(targets.shape, generator=generator, device=device) < ignored] = -100
        return {"logits": logits, "targets": targets, "temperature": temperature, "entropy": entropy}

    return make


def _far_apart(logits: Tensor) -> Tensor:
    """The same rows 1.1e9 elements apart: offsets do not fit 32 bits. Nothing between is ever touched."""
    rows, vocab = logits.shape
    distance = 1_100_000_000
    room = torch.empty(distance * (rows - 1) + vocab, dtype=logits.dtype, device=logits.device)
    return room.as_strided((rows, vocab), (distance, 1)).copy_(logits)


SAMPLES = tuple(
    Sample(name=name, make=make)
    for name, make in {
        "vocabulary of 1": _make((3,), 1),
        "vocabulary of 63": _make((2, 3), 63),
        "vocabulary of 123, no entropy": _make((5,), 123, entropy=False),
        "vocabulary of 1000, temperature 0.7": _make((2, 2), 1000, temperature=0.7),
        "vocabulary of 4096": _make((3,), 4096),
        "odd vocabulary of 50257": _make((3,), 50257),
        "vocabulary of 262144, temperature 1.5": _make((2,), 262144, temperature=1.5),
        "one row": _make((), 1000),
        "no rows": _make((0, 4), 100),
        "four leading dimensions": _make((2, 1, 2, 2), 200),
        "some rows ignored": _make((4, 8), 123, ignored=0.5, temperature=0.9),
        "every row ignored": _make((3,), 100, ignored=1.0),
        "most of the vocabulary at -inf": _make((6,), 9000, masked=0.9),
        "all but the target at -inf": _make((3,), 777, masked=1.0),
        "sharp distributions": _make((4,), 5000, spread=40.0),
        "logits shifted, odd vocabulary": _make((2, 5), 1001, layout=lambda z: z[:, :-1]),
        "logits shifted, even vocabulary": _make((3, 5), 1024, layout=lambda z: z[:, :-1], ignored=0.3),
        "logits beginning at an odd address": _make((2, 5), 1001, layout=lambda z: z[:, 1:]),
        "vocabulary sliced": _make((2, 4), 5000, layout=lambda z: z[..., :4321]),
        "vocabulary not the fastest": _make((12,), 1000, layout=lambda z: z.t().contiguous().t()),
        "three strides": _make((2, 4, 6), 100, layout=lambda z: z[:, ::2, ::3]),
        "expanded rows": _make((1,), 100, layout=lambda z: z.clone().expand(4, -1)),
        "rows 1.1e9 elements apart": _make((3,), 1000, layout=_far_apart),
    }.items()
)


def _workload(rows: int, vocab: int, dtype: torch.dtype, entropy: bool) -> Workload:
    """A logit is read once forward; read again, and its gradient written, backward. Rows: an id, floats."""
    logits = rows * vocab * dtype.itemsize
    per_row = rows * (8 + 4 * (3 if entropy else 2))
    kind = str(dtype).removeprefix("torch.")
    return Workload(
        name=f"{rows}x{vocab} {kind}{' + entropy' if entropy else ''}",
        dtype=dtype,
        make=_make((rows,), vocab, entropy=entropy, spread=2.0),
        forward=Cost(bytes_moved=logits + per_row, flops=rows * vocab * (7 if entropy else 5)),
        backward=Cost(bytes_moved=2 * logits + 2 * per_row, flops=rows * vocab * (6 if entropy else 4)),
    )


WORKLOADS = tuple(
    _workload(rows, vocab, dtype, entropy)
    for rows, vocab, dtype in (
        (8192, 128256, torch.bfloat16),
        (4096, 201088, torch.bfloat16),
        (8192, 49152, torch.bfloat16),
        (8192, 50257, torch.bfloat16),
        (8192, 128256, torch.float32),
    )
    for entropy in (False, True)
)


def _plain(logits: Tensor, targets: Tensor, temperature: float, entropy: bool) -> Outputs:
    """What trainers write: everything from one log_softmax in fp32."""
    log_p = (logits.float() / temperature).log_softmax(-1)
    logps = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return (logps, -(log_p.exp() * log_p).sum(-1)) if entropy else (logps,)


def _ours(logits: Tensor, targets: Tensor, temperature: float, entropy: bool, inplace: bool = False) -> Outputs:
    # A view, because a leaf refuses to become its own gradient.
    found = token_logprobs(
        logits.view_as(logits) if inplace else logits,
        targets,
        temperature=temperature,
        entropy=entropy,
        inplace_backward=inplace,
    )
    return (found.logps, found.entropy) if entropy else (found.logps,)


def _contenders(inputs: Inputs) -> Mapping[str, Callable[[], Outputs]]:
    found: dict[str, Callable[..., Outputs]] = {
        "pegbox": _ours,
        "pegbox, in place": partial(_ours, inplace=True),
        "torch": _plain,
        "torch.compile": torch.compile(_plain, dynamic=False),
    }
    try:
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax
    except ImportError:
        pass
    else:

        def trl(logits: Tensor, targets: Tensor, temperature: float, entropy: bool) -> Outputs:
            logps = selective_log_softmax(logits[None], targets[None], temperature)
            return (logps, entropy_from_logits(logits[None] / temperature)) if entropy else (logps,)

        found["trl"] = trl
    try:
        from trl.kernels import selective_log_softmax_and_entropy
    except ImportError:
        pass
    else:

        def trl_fused(logits: Tensor, targets: Tensor, temperature: float, entropy: bool) -> Outputs:
            logps, entropies = selective_log_softmax_and_entropy(logits[None], targets[None], temperature)
            return (logps, entropies) if entropy else (logps,)

        found["trl, fused"] = trl_fused
    try:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    except ImportError:
        pass
    else:

        def liger(logits: Tensor, targets: Tensor, temperature: float, entropy: bool) -> Outputs:
            # Gradients are made in its forward, in the memory of the logits.
            loss = LigerCrossEntropyFunction.apply(logits.view_as(logits), targets, None, -100, 0.0, 0.0, "none")
            return (loss[0],)

        if not inputs["entropy"] and inputs["temperature"] == 1.0:
            found["liger cross-entropy"] = liger
    return {name: partial(contender, **inputs) for name, contender in found.items()}


def _variants(inputs: Inputs) -> Mapping[str, Callable[[], object]]:
    """Both kernels under launch settings around the default."""
    from pegbox_kernels.logprob import triton as kernels

    logits, targets = inputs["logits"], inputs["targets"]
    temperature, entropy = inputs["temperature"], inputs["entropy"]
    _, entropies, logsumexp, parts = kernels.forward(logits, targets, temperature, -100, entropy)
    grads = (logsumexp, logsumexp, logsumexp)
    saved = (logits, targets, parts, entropies, grads, temperature, -100)
    out = torch.empty_like(logits)
    found: dict[str, Callable[[], object]] = {}
    for warps in (4, 8, 16):
        for loads in (1, 2, 4, 8):
            launch = kernels.Launch(warps, loads)
            forward = partial(kernels.forward, logits, targets, temperature, -100, entropy, launch=launch)
            found[f"forward  {warps} warps x {loads} loads"] = forward
            found[f"backward {warps} warps x {loads} loads"] = partial(kernels.backward, *saved, out=out, launch=launch)
    return found


SPEC = OpSpec(
    name="logprob",
    source="online softmax: arXiv:1805.02867; entropy beside it and its gradient: README.md",
    op=token_logprobs,
    reference=reference.token_logprobs,
    differentiable=("logits",),
    outputs=("logps", "entropy", "logsumexp"),
    samples=SAMPLES,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    workloads=WORKLOADS,
    contenders=_contenders,
    variants=_variants,
)
