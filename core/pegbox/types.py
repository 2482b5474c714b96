"""What hooks pass to each other: frozen, typed objects. Torch appears in annotations only.

Shape suffixes of tensor names:

    B  rows of a micro-batch      T  tokens of a row (padded)      N  trained tokens of a micro-batch
    H  hidden size                V  vocabulary                    S  document borders of a packed micro-batch
    R  rollouts                   C  labels of a classifying head

`targets_BT[b, t]` is the token after position t, or -100 where nothing is trained; a document's last token never is.
`trained_N`: the flat indices b * T + t of the trained positions, ascending: no device has to be asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from pegbox.record import Record
from pegbox.rows import Batch, BatchSource

if TYPE_CHECKING:
    from torch import Tensor, device, nn, optim
    from transformers import PreTrainedTokenizerBase

    from pegbox.section import Section

Role = Literal["policy", "reference", "reward", "teacher", "features"]
Need = Literal["logps", "entropy", "hidden", "logits", "router_logits", "values"]


class ConfigSection(Record):
    """A plugin's section of the config: the frozen pydantic model that holds it."""

    schema: type[Section]


class Item(Record):
    """A named thing of an open kind that other plugins may look up with `ctx.items(kind)`; `doc` is one sentence.

    Kinds: `format`, `source`, `template`, `optimizer`, `schedule`, `reward`, `metric`, `health_rule`, `model_format`,
    `export_format`, or a plugin's own. `target` is the object, or `"package.module:attribute"`, imported on use.
    """

    kind: str
    name: str
    target: object
    doc: str = ""


class Runtime(Protocol):
    """Devices and processes of a run; `precision` is the arithmetic of forwards."""

    rank: int
    local_rank: int
    world_size: int
    device: device
    precision: Literal["fp32", "bf16", "fp16"]

    def barrier(self) -> None: ...
    def gather_objects(self, value: object) -> list[object]:
        """The value of every rank, in rank order, on every rank."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on every rank, without waiting for the device."""


class Processor(Record):
    """The tokenizer of a model, other parts (image, audio) by name, and what identifies all that changes token ids."""

    tokenizer: PreTrainedTokenizerBase
    pad_id: int
    fingerprint: str
    parts: Mapping[str, object] = field(default_factory=dict)


class ModelOptions(Record):
    """What plugins ask of a model before it is loaded.

    Attributes:
        empty: build on meta, another process sends the weights.
        classify: in place of the next token the model predicts `labels` numbers, for a `sequence` or for each `token`.
    """

    dtype: str | None = None
    attention: str | None = None
    experts: str | None = None
    quantization: object | None = None
    keep_packed: tuple[str, ...] | None = None
    empty: bool | None = None
    classify: Literal["sequence", "token"] | None = None
    labels: int | None = None


class ModelRequest(Record):
    """Which model to load, for which role. `meta`: no weights, everything on the meta device."""

    name: str
    format: str
    role: Role = "policy"
    revision: str | None = None
    meta: bool = False
    options: ModelOptions = field(default_factory=ModelOptions)


class Outputs(Record):
    """What one forward returned: the fields that were asked for, the others None. `_N` follows `Batch.trained_N`.

    `values_BTC`: what a model with a head of C labels predicts at each token.
    """

    logps_N: Tensor | None = None
    entropy_N: Tensor | None = None
    logits_NV: Tensor | None = None
    hidden_BTH: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    values_BTC: Tensor | None = None


class Placement(Protocol):
    """How a model lies on devices. Owned by `place_model`; used by the loop and the checkpoint store."""

    name: str

    def synchronize_gradients(self, enabled: bool) -> AbstractContextManager[None]:
        """Around one forward and backward: whether its gradients are averaged over ranks."""

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """Clip the global gradient norm and return it as it was before, on the device. None: only measure."""

    def save(self, folder: Path, optimizer: optim.Optimizer) -> None:
        """Write trainable parameters, buffers and optimizer state. Every rank calls it; the folder exists."""

    def load(self, folder: Path, optimizer: optim.Optimizer) -> None:
        """Read back what `save` wrote, exactly."""


class Model(Record):
    """A model in one role; `name` is what the config called it, `format` what it was loaded from.

    Attributes:
        module: the network, adapters included, never wrapped; its parameter names are the names of the run.
        base: what `from_pretrained` opens to get the base model: a folder or a hub name.
        compute: `compute(module, batch, needs)` runs one forward and returns what was asked for.
        traits: `causal`, `moe`, `sliding_window`, `tied_head` ...: so that nobody asks for a model type.
        adapter: the export format of the adapter applied (`peft`), or None; without one the export format is `format`.
        without_adapter: within it the module computes as it did before the adapter was applied; None without one.
        placement, forward: set by `place_model`; `forward(batch, needs)` runs `compute` on the placed module.
    """

    module: nn.Module
    name: str
    base: str
    format: str
    compute: Callable[[nn.Module, Batch, frozenset[Need]], Outputs]
    role: Role = "policy"
    traits: frozenset[str] = frozenset()
    adapter: str | None = None
    without_adapter: Callable[[], AbstractContextManager[None]] | None = None
    placement: Placement | None = None
    forward: Callable[[Batch, frozenset[Need]], Outputs] | None = None


class ModulePatch(Record):
    """A declared change of modules, applied to instances of one model, never to a class, and why (one sentence).

    Attributes:
        slot: what is replaced: `attention`, `norm`, `mlp`, `rope`, `head`, `experts` ... One patch per module and slot.
        target: glob over fully qualified module names, e.g. `model.layers.*.self_attn`, or a predicate (name, module).
        replace: called with each matched module, innermost first; returns a module (it takes the place of the old one,
            at all its names), a plain callable (it becomes the instance's `forward`), or a `SeamChange`. It keeps the
            module or the forward that it finds, where an earlier patch put it.
        requires: traits the model must have; `source`: paper, project or page it follows.
        after: names of plugins whose patches on the same slot this one builds upon.
    """

    slot: str
    target: str | Callable[[str, nn.Module], bool]
    replace: Callable[[nn.Module], nn.Module | Callable[..., object] | SeamChange]
    reason: str
    source: str = ""
    requires: frozenset[str] = frozenset()
    after: tuple[str, ...] = ()


class SeamChange(Record):
    """A change through a seam that a library offers: `holder.attribute` is set to `value`, and set back on undo.

    `calls()` counts uses of the new implementation, so that the patch can prove that it acts.
    """

    seam: str
    holder: object
    attribute: str
    value: object
    calls: Callable[[], int]


class Term(Record):
    """One term of a loss: its value is the sum of `total` over a step divided by the sum of `count` over it.

    `count` may lie on the device, where only that knows it.
    """

    name: str
    total: Tensor
    count: float | Tensor
    weight: float = 1.0


class LossOutput(Record):
    """The terms of a loss over one micro-batch, and further figures to log (their weight is not used)."""

    terms: tuple[Term, ...]
    metrics: tuple[Term, ...] = ()


class Loss(Protocol):
    """A loss declares what it needs and never calls the model. `scope = "batch"`: it needs a whole batch at once.

    An attribute `uniform = True` promises one gradient for all trained log-probabilities, so that a head may use it;
    `extras`, a set of names, says what it needs of `Batch.extra`: some active plugin declares each as an item `extra`;
    `entropy_gradient = True`: it differentiates the entropy, so that a head may not make its own gradient early.
    """

    needs: frozenset[Need]
    scope: Literal["token", "batch"]

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """The count of each term, by name; the loop sums them over a step before its first backward."""

    def __call__(self, batch: Batch, outputs: Outputs) -> LossOutput: ...


class GroupOptions(Record):
    """What parameters whose name matches the regular expression `pattern` (searched) get; None leaves a value alone."""

    pattern: str
    learning_rate: float | None = None
    learning_rate_scale: float | None = None
    weight_decay: float | None = None
    tag: str | None = None


class ParameterGroup(Record):
    """Trainable parameters that share merged options; `names` are parameter names of `Model.module`."""

    names: tuple[str, ...]
    options: GroupOptions


class Optimization(Record):
    """The optimizer and its learning-rate schedule, stepped together."""

    optimizer: optim.Optimizer
    schedule: optim.lr_scheduler.LRScheduler


class Checkpoint(Record):
    """A saved state of a run: complete, or it would not be listed."""

    step: int
    path: Path


class CheckpointStore(Protocol):
    """One atomic store. A checkpoint appears complete or not at all."""

    def save(self, step: int, model: Model, optimization: Optimization) -> Checkpoint: ...
    def restore(self, checkpoint: Checkpoint, model: Model, optimization: Optimization) -> None:
        """Bring model, optimizer, schedule and every registered state back, exactly."""

    def list(self) -> list[Checkpoint]:
        """Complete checkpoints, oldest first."""


class Job(Record):
    """What `run_training` gets: everything that was built."""

    model: Model
    loss: Loss
    train: BatchSource
    eval: BatchSource | None
    optimization: Optimization
    checkpoints: CheckpointStore
    resume: Checkpoint | None = None


class Outcome(Record):
    """How a training ended: `finished`, `stopped` (a signal asked), or `interrupted` (Ctrl-C, SIGTERM)."""

    reason: Literal["finished", "stopped", "interrupted"]
    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None


class ExportRequest(Record):
    """Write into `folder`, in `format`; the folder exists."""

    folder: Path
    format: str
