"""From a config to an estimate: what a process needs, by plugin; whether it fits a device; the largest that would.

    allocated   what tensors take at the peak of a step, and the workspace of matrix products
    reserved    with what lies between tensors: the allocator keeps whole blocks, and they do not fit each other exactly
    process     with the context of the device, which no allocator counts: this is what runs out

Workspace, fragmentation and context are constants that are stated, not computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegbox.plan import compose

from pegbox_memory.kernels import attention
from pegbox_memory.shape import GIB, Shape, device_bytes, dtype_there, shape_of

if TYPE_CHECKING:
    from pegbox.context import Context

    from pegbox_memory.step import Peak, TrainedStep

CONTEXT_BYTES = GIB // 2
WORKSPACE_BYTES = 32 << 20
FRAGMENTATION = 0.05
TRIALS = 8
KINDS = {
    "frozen weights": ("load_model", "weights that are not trained"),
    "reference": ("reference", "weights of the reference"),
    "trained weights": ("load_model", "weights that are trained"),
    "adapters": ("apply_adapters", "adapters"),
    "buffers": ("load_model", "buffers"),
    "gradients": ("run_training", "gradients"),
    "optimizer": ("build_optimizer", "state of the optimizer"),
    "layers": ("recompute", "what layers keep for the backward"),
    "head": ("head", "logits and what is computed from them"),
    "backward": ("run_training", "gradients of activations, and what is computed again"),
    "other": ("load_model", "between layers: embeddings, masks, copies of weights"),
    "batch": ("build_batches", "the micro-batch"),
    "cache": ("generate_rollouts", "keys and values of completions"),
    "sampling": ("generate_rollouts", "logits of next tokens, and what computes them"),
    "unpacked": ("configure_model", "the matrix that is unpacked"),
    "workspace": ("torch", "workspace of matrix products"),
}
"""What is counted: the hook whose owner it belongs to, or the slot of a patch, and what it is."""


@dataclass(frozen=True)
class Row:
    """One line of an estimate."""

    kind: str
    what: str
    plugin: str
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """What one process needs; all sizes in bytes.

    Attributes:
        rows: what is in memory at the peak; they sum to `allocated`.
        during: what the step is doing at the peak.
        recomputed: layers that are computed again, where that was chosen by memory.
        device: of the device, if known; `fits` and the proposal need it.
        largest_micro_batch: the most rows that fit; None: not asked, or not even one does.
    """

    model: str
    micro_batch: int
    tokens: int
    precision: str
    during: str
    rows: tuple[Row, ...]
    allocated: int
    reserved: int
    context: int
    device: int | None = None
    largest_micro_batch: int | None = None
    layers: int = 0
    recomputed: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def process(self) -> int:
        """What runs out."""
        return self.reserved + self.context

    @property
    def fits(self) -> bool | None:
        """Whether it fits the device; None: no device is known."""
        return None if self.device is None else self.process <= self.device

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "process": self.process, "fits": self.fits}


@dataclass
class Asked:
    """A config as it was given, of which variants are composed."""

    source: str | Path | Mapping[str, Any]
    overrides: tuple[str, ...] = ()
    made: dict[tuple[str, ...], TrainedStep] = field(default_factory=dict)

    def composed(self, *more: str) -> Context:
        return compose(self.source, [*self.overrides, *more])

    def step(self, shape: Shape, *more: str) -> TrainedStep:
        """The step of a variant; built once."""
        from pegbox_memory.step import trained_step

        if more not in self.made:
            import torch

            here = shape.on_gpu and torch.cuda.is_available()
            device = torch.device("cuda", torch.cuda.current_device()) if here else torch.device("cpu")
            self.made[more] = trained_step(self.composed(*more), device, shape.precision, for_gpu=shape.on_gpu)
        return self.made[more]

    def close(self) -> None:
        """Take the patches of all variants back."""
        while self.made:
            _, step = self.made.popitem()
            step.ctx.kernel.patches.undo()
            step.ctx.exit.close()


def estimate(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    device_gib: float | None = None,
    tokens: int | None = None,
    micro_batch: int | None = None,
) -> Estimate:
    """What a run of a config needs.

    Args:
        source, overrides: as `pegbox.plan.compose` takes them.
        device_gib: memory of the device; of the GPU of this machine if there is one.
        tokens: length of the longest row; from the config unless given.
        micro_batch: rows of a micro-batch; from the config unless given.

    Raises:
        ConfigError: the config does not say how long rows are, or how many.
        RunError: the model cannot be computed without data.
    """
    asked = Asked(source, tuple(overrides))
    ctx = asked.composed()
    shape = shape_of(ctx, tokens, micro_batch)
    device = device_bytes(device_gib, shape)
    variant, notes = dtype_there(ctx, shape)
    if shape.on_gpu:
        ours, told = attention(ctx)
        variant, notes = (*variant, *ours), [*notes, *told]
    auto = ctx.config.resolved().get("activations", {}).get("policy") == "auto"
    try:
        if not auto:
            return _fixed(asked, variant, shape, device, notes)
        return _chosen(asked, variant, shape, device, notes)
    finally:
        asked.close()


def _fixed(asked: Asked, variant: tuple[str, ...], shape: Shape, device: int | None, notes: Sequence[str]) -> Estimate:
    step = asked.step(shape, *variant)

    def of(rows: int) -> Estimate:
        return _estimate(step, _peak(step, shape, rows), shape, rows, device, (*notes, *step.notes))

    made = of(shape.micro_batch)
    return _with_largest(made, of, device)


def _chosen(asked: Asked, variant: tuple[str, ...], shape: Shape, device: int | None, notes: Sequence[str]) -> Estimate:
    """Under a policy that goes by memory: as few layers are computed again as fit."""
    every = asked.step(shape, *variant, *AUTO_AS, "activations.policy=full")
    one = asked.step(shape, *variant, *AUTO_AS, "activations.policy=1")
    margin = float(asked.composed().config.resolved()["activations"]["margin"])
    cap = asked.composed().config.resolved()["activations"]["memory_gib"]
    room = min(_available(device, shape), cap * GIB if cap else math.inf) * (1 - margin)

    def recomputed(rows: int) -> Estimate:
        return _estimate(every, _peak(every, shape, rows), shape, rows, device, (*notes, *every.notes), every.layers)

    if math.isinf(room):
        notes = [*notes, "no device is known, so nothing is taken to be computed again"]
    most = recomputed(shape.micro_batch)
    least = _estimate(one, _peak(one, shape, shape.micro_batch), shape, shape.micro_batch, device, notes, 1)
    layer = (least.allocated - most.allocated) / max(1, every.layers - 1)
    kept = every.layers if math.isinf(room) else max(0, int((room - most.allocated) // max(layer, 1.0)))
    count = max(0, every.layers - kept)
    if 1 < count < every.layers:
        step = asked.step(shape, *variant, *AUTO_AS, f"activations.policy={count}")
        made = _estimate(step, _peak(step, shape, shape.micro_batch), shape, shape.micro_batch, device, notes, count)
    else:
        made = most if count == every.layers else least
    if count == 0:
        made = _grown(least, "layers", round(layer), shape)
    return _with_largest(made, recomputed, device)


AUTO_AS = ("activations.memory_gib=null", "activations.margin=0.08")
"""A fixed number of layers goes by no memory."""


def _peak(step: TrainedStep, shape: Shape, rows: int) -> Peak:
    learning = step.peak(rows, shape.tokens, bins=shape.packed, micro_batches=shape.micro_batches, prompt=shape.prompt)
    if shape.generation is None:
        return learning
    return max(learning, step.sampling_peak(shape.generation), key=lambda peak: peak.total)


def _estimate(
    step: TrainedStep,
    peak: Peak,
    shape: Shape,
    rows: int,
    device: int | None,
    notes: Sequence[str],
    recomputed: int | None = None,
) -> Estimate:
    sizes = dict(peak.bytes)
    if step.stored.built:
        sizes["frozen weights"] = sizes.get("frozen weights", 0) - step.stored.built + step.stored.kept
        sizes["unpacked"] = step.stored.unpacked
    if shape.on_gpu:
        sizes["workspace"] = WORKSPACE_BYTES
    owners = _owners(step.ctx)
    found = [Row(kind, what, owners(whose), sizes[kind]) for kind, (whose, what) in KINDS.items() if sizes.get(kind)]
    allocated = sum(row.bytes for row in found)
    return Estimate(
        model=step.model.name,
        micro_batch=rows,
        tokens=shape.tokens,
        precision=shape.precision,
        during=peak.during,
        rows=tuple(found),
        allocated=allocated,
        reserved=_reserved(allocated, shape.on_gpu),
        context=CONTEXT_BYTES if shape.on_gpu else 0,
        device=device,
        layers=step.layers,
        recomputed=recomputed,
        notes=(*shape.notes, *notes),
    )


def _grown(made: Estimate, kind: str, more: int, shape: Shape) -> Estimate:
    """The same with more of one kind: one more layer keeps everything."""
    from dataclasses import replace

    rows = tuple(replace(row, bytes=row.bytes + more) if row.kind == kind else row for row in made.rows)
    allocated = sum(row.bytes for row in rows)
    return replace(made, rows=rows, allocated=allocated, reserved=_reserved(allocated, shape.on_gpu), recomputed=0)


def _with_largest(made: Estimate, of: Callable[[int], Estimate], device: int | None) -> Estimate:
    from dataclasses import replace

    return made if device is None else replace(made, largest_micro_batch=_largest(of, device))


def _largest(of: Callable[[int], Estimate], device: int) -> int | None:
    """The most rows that fit.

    Need grows with rows along a line that may bend upwards, where another moment of the step becomes the peak. So a
    line through two sizes that fit aims too high, and the chord between one that fits and one that does not too low:
    the two close in on the answer in a few trials.
    """
    need: dict[int, int] = {}

    def at(rows: int) -> int:
        if rows not in need:
            need[rows] = of(rows).process
        return need[rows]

    if at(1) > device:
        return None
    low, high = 1, 2
    while at(high) <= device:
        slope = max(1, at(high) - at(low)) / (high - low)
        low, high = high, high + max(1, math.ceil((device - at(high)) / slope))
    for _ in range(TRIALS):
        if high - low == 1:
            break
        chord = low + int((device - at(low)) * (high - low) / max(1, at(high) - at(low)))
        trial = min(max(chord, low + 1), high - 1)
        low, high = (trial, high) if at(trial) <= device else (low, trial)
    return low


def _reserved(allocated: int, on_gpu: bool) -> int:
    return math.ceil(allocated * (1 + FRAGMENTATION)) if on_gpu else allocated


def _available(device: int | None, shape: Shape) -> float:
    return math.inf if device is None else device - (CONTEXT_BYTES if shape.on_gpu else 0)


def _owners(ctx: Context) -> Callable[[str], str]:
    """Who owns a hook, or patched a slot; without one, who loads the model."""
    patched = {applied.patch.slot: applied.plugin for applied in ctx.kernel.patches.applied}
    jobs: dict[str, str] = {}
    for job in ctx.plan.jobs:
        jobs.setdefault(job.hook.partition(":")[0].partition("[")[0].strip(), job.plugins[0])

    def who(name: str) -> str:
        if name in ("torch", "reference"):
            return name
        return patched.get(name) or jobs.get(name) or jobs.get("load_model", "")

    return who
