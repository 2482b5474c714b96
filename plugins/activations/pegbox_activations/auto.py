"""The policy `auto`: no more is computed again than memory asks for.

    step 1        every layer is computed again, but for one of each kind, which is measured; after it the optimizer's
                  state is in memory, and so all that is needed for a first choice is known
    steps 2, 3    the peak with that choice tells what the first estimate left over; the choice grows
    from then on  each micro-batch gets the most that fits for its tokens and the length of its rows: short ones keep
                  more, one that is longer than all before keeps less, before it is computed

The figures come from torch's allocator and from shapes, which the host knows: no step waits for the device. A choice
changes what is kept and nothing of what is computed, so each process may make its own, unless layers hold parts that
are sharded by themselves: then computing a layer again gathers weights, every process must do it, and the smallest
choice of all processes holds, for every micro-batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from pegbox.errors import ConfigError
from pegbox.events import Event, GradientsReady, Logged, RunEnded, RunStarted, Stepped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pegbox_activations.attention import AttentionKeeper
from pegbox_activations.budget import Choice, LayerBytes, Measured, Shape, choose
from pegbox_activations.gauge import GIB, CountingGauge, Gauge, gauge_of
from pegbox_activations.measuring import hidden_states, measured, signature

if TYPE_CHECKING:
    from pegbox.context import Context

    from pegbox_activations.config import ActivationsConfig

CALIBRATING = 3
"""Optimizer steps after which the choice stands."""
PATIENCE = 10
"""Steps after which an optimizer without state is taken to have none."""
LESS = 0.95
"""What remains of the limit each time that memory ran out and blocks had to be given back."""
RECORD = "activations.json"


class AutoPolicy:
    """Decides for each layer of each forward what it keeps.

    Attributes:
        choice: of the forward that runs, or of the last one.
    """

    def __init__(self, config: ActivationsConfig, root: nn.Module, layers: Sequence[nn.Module]) -> None:
        self._config, self._root, self._layers = config, root, list(layers)
        self.choice = Choice()
        self._keeper = AttentionKeeper()
        self._gauge: Gauge | None = None
        self._examples = self._kinds()
        self._sizes: dict[int, LayerBytes] = {}
        self._steps = self._waited = 0
        self._fixed: int | None = None
        self._working = 0
        self._largest = Shape(0, 0)
        self._step_largest = (Shape(0, 0), Choice())
        self._measured: Measured | None = None
        self._refined: Measured | None = None
        self._limit, self._part, self._refusals = 0.0, 1.0, 0
        self._together: bool | None = None
        self._said = False

    # ---- forward ----

    def run(self, index: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of layer `index`, with as much kept as was decided."""
        hidden = hidden_states(args, kwargs)
        if index == 0:
            self._begin(hidden)
        kind = self.choice.kind(index, len(self._layers))
        if self._measured is None:
            return self._calibrate(index, original, args, kwargs, hidden)
        if isinstance(self._gauge, CountingGauge):
            self._count(index, hidden, kind)
        return self._compute(kind, original, args, kwargs)

    def _compute(self, kind: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kind == "whole":
            return original(*args, **kwargs)
        more = {"context_fn": self._keeper.contexts} if kind == "attention" else {}
        preserve = self._config.preserve_rng
        return checkpoint(original, *args, use_reentrant=False, preserve_rng_state=preserve, **more, **kwargs)

    def _begin(self, hidden: Tensor) -> None:
        """A forward begins: what it may keep depends on its shape."""
        if self._gauge is None:
            config = self._config
            self._gauge = gauge_of(hidden.device, self._root, config.memory_gib, config.margin)
        gauge, shape = self._gauge, shape_of(hidden)
        if self._fixed is None and self._steps < CALIBRATING:
            gauge.restart()
            self._fixed = gauge.allocated()
        gauge.forward_begins()
        self._largest = Shape(max(self._largest.tokens, shape.tokens), max(self._largest.row, shape.row))
        if self._measured is not None and not self._together:
            self.choice = self._choose(shape)
        if shape.tokens >= self._step_largest[0].tokens:
            self._step_largest = (shape, self.choice)

    def _calibrate(
        self, index: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
    ) -> Any:
        assert self._gauge is not None, "the first layer found it"
        if index not in self._examples or shape_of(hidden).tokens < self._step_largest[0].tokens:
            self._gauge.count(_size(hidden))
            return self._compute("inputs", original, args, kwargs)
        call = partial(original, *args, **kwargs)
        row = shape_of(hidden).row
        output, self._sizes[index] = measured(self._layers[index], call, (args, kwargs), row, self._gauge.allocated)
        self._gauge.count(_size(hidden) + _total(self._sizes[index]))
        return output

    def _count(self, index: int, hidden: Tensor, kind: str) -> None:
        """Tell a gauge that cannot see it what this layer keeps."""
        assert self._measured is not None, "callers ask"
        assert self._gauge is not None, "the first layer found it"
        shape = shape_of(hidden)
        kept = {"whole": self._measured.whole, "attention": self._measured.attention}.get(kind)
        self._gauge.count(_size(hidden) + (int(kept(index, shape)) if kept else 0))

    def _kinds(self) -> dict[int, int]:
        """The last layer of each kind, and how many there are of it."""
        last: dict[tuple[object, ...], int] = {signature(layer): at for at, layer in enumerate(self._layers)}
        kinds = [last[signature(layer)] for layer in self._layers]
        self._kind_of = kinds
        return {at: kinds.count(at) for at in set(kinds)}

    # ---- between steps ----

    def on_event(self, ctx: Context, event: Event) -> None:
        """Learn from the figures of a step."""
        if isinstance(event, RunStarted):
            refuse_compiled(ctx)
        elif isinstance(event, GradientsReady) and self._fixed is not None:
            self._step_ready(event)
        elif isinstance(event, Stepped) and self._fixed is not None:
            self._stepped(ctx, event)
        elif isinstance(event, Logged) and self._steps >= CALIBRATING:
            self._look_again(ctx)
        elif isinstance(event, RunEnded) and self._measured is not None and not self._said:
            self._say(ctx)

    def _step_ready(self, event: GradientsReady) -> None:
        assert self._gauge is not None, "a forward found it"
        assert self._fixed is not None, "callers ask"
        if isinstance(self._gauge, CountingGauge):
            self._gauge.optimizer = event.optimizer
        shape, choice = self._step_largest
        if self._measured is None:
            self._working = max(0, self._gauge.peak() - self._fixed)
        elif shape.tokens >= self._measured.shape.tokens and shape.row >= self._measured.shape.row:
            kept = self._measured.need(choice, shape) - self._measured.base(shape)
            working = max(0, round(self._gauge.peak() - self._measured.fixed - kept))
            layers = tuple(self._at(self._measured, index, shape) for index in range(len(self._layers)))
            self._refined = Measured(shape, self._measured.fixed, working, layers)

    def _stepped(self, ctx: Context, event: Stepped) -> None:
        assert self._gauge is not None
        self._waited += 1
        if not event.optimizer.state and self._waited < PATIENCE:
            # A gradient scaler skipped the step: the optimizer's state is still to come.
            self._fixed = None
            return
        self._steps += 1
        if self._measured is None:
            layers = tuple(self._sizes[at] for at in self._kind_of)
            self._measured = Measured(self._step_largest[0], self._gauge.allocated(), self._working, layers)
        self._fixed, self._step_largest = None, (Shape(0, 0), Choice())
        self._decide(ctx)
        if self._steps == CALIBRATING:
            self._refusals = self._gauge.refusals()
            self._say(ctx)

    def _look_again(self, ctx: Context) -> None:
        """Where the loop waits anyway: whether memory ran out since, or turned out to be less."""
        assert self._gauge is not None
        refusals = self._gauge.refusals()
        if refusals > self._refusals:
            self._refusals, self._part = refusals, self._part * LESS
            ctx.log.info("activations: memory ran short, so layers may use %.0f %% of it", 100 * self._part)
        self._decide(ctx)

    def _decide(self, ctx: Context) -> None:
        assert self._gauge is not None
        self._limit = self._gauge.limit() * self._part
        if self._together is None:
            self._together = ctx.runtime.world_size > 1 and _sharded_inside(self._layers)
        if self._together:
            own = self._choose(self._largest)
            every: list[Any] = ctx.runtime.gather_objects((own.whole, own.whole + own.attention))
            whole, both = (min(column) for column in zip(*every, strict=True))
            self.choice = Choice(whole, max(0, both - whole))

    def _choose(self, shape: Shape) -> Choice:
        assert self._measured is not None
        near = self._refined if self._refined and shape.tokens >= self._refined.shape.tokens else self._measured
        return choose(near, self._limit, shape, attention=self._config.keep != "inputs")

    @staticmethod
    def _at(known: Measured, index: int, shape: Shape) -> LayerBytes:
        """What a layer keeps at another shape."""
        layer, tokens = known.layers[index], shape.tokens / known.shape.tokens
        return LayerBytes(
            weights=layer.weights,
            tokens=round(layer.tokens * tokens),
            pairs=round(layer.pairs * tokens * shape.row / known.shape.row),
            attention=round(layer.attention * tokens),
        )

    # ---- what was chosen ----

    def _say(self, ctx: Context) -> None:
        """Print the choice for the largest micro-batch so far, and put it beside the run's record; once."""
        self._said = True
        assert self._measured is not None
        shape = self._largest
        choice = self.choice if self._together else self._choose(shape)
        known = self._refined or self._measured
        count = len(self._layers)
        rest = count - choice.whole - choice.attention
        ctx.log.info(
            "activations: %s of %s layers keep everything, %s what attention returned, %s are computed again from "
            "their inputs (%s tokens in rows of %s; %.2f of %.2f GiB)",
            *(choice.whole, count, choice.attention, rest, f"{shape.tokens:,}", f"{shape.row:,}"),
            *(known.need(choice, shape) / GIB, self._limit / GIB),
        )
        if ctx.runtime.rank == 0:
            ctx.folder.mkdir(parents=True, exist_ok=True)
            content = {
                "layers": count,
                "keep_everything": choice.whole,
                "keep_attention": choice.attention,
                "for": asdict(shape),
                "needed_bytes": round(known.need(choice, shape)),
                "limit_bytes": round(self._limit),
                "measured": asdict(known),
            }
            (ctx.folder / RECORD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def refuse_compiled(ctx: Context) -> None:
    """Raise if layers are compiled: a graph would hold on to the choice of the step it was made in.

    Raises:
        ConfigError: naming the plugin.
    """
    who = next((applied.plugin for applied in ctx.kernel.patches.applied if applied.patch.slot == "compile"), None)
    if who is not None:
        raise ConfigError(
            f"activations.policy is auto, and '{who}' compiles layers",
            "What a layer keeps is decided at each micro-batch, and a compiled graph cannot change its mind.",
            f"Set activations.policy to full, none or a number of layers, or remove {who} from plugins.",
        )


def shape_of(hidden: Tensor) -> Shape:
    """The shape of a micro-batch, from the hidden states `_BTH` (or `_NH`) that a layer gets."""
    tokens = max(1, hidden.numel() // max(1, hidden.shape[-1]))
    return Shape(tokens, max(1, hidden.shape[-2] if hidden.ndim > 1 else 1))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _total(layer: LayerBytes) -> int:
    return layer.weights + layer.tokens + layer.pairs


def _sharded_inside(layers: Sequence[nn.Module]) -> bool:
    """Whether parts of layers are sharded by themselves: then computing a layer again communicates."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for layer in layers for part in layer.modules() if part is not layer)
